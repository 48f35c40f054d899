package tests

import (
	"context"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/machine"
)

// What of the suite is not for this driver: by the regular expression that skips it, and why.
var notForUs = map[string]string{
	`\[Controller Server\]`: "an inline volume has no controller: kubelet calls the node plugin only",
	`\[GroupController `:    "the same, and there is nothing to take a snapshot of",
	`Node Service NodePublishVolume with single node multi`: "read-only volumes have no writers",
	`Node Service Node(Unstage|Stage)Volume`:                "STAGE_UNSTAGE_VOLUME is not announced: nothing is shared by the Pods of a node",
	`Node Service NodeGetVolumeStats`:                       "GET_VOLUME_STATS is not announced: kubelet counts what a tmpfs takes",
	`Node Service NodeExpandVolume`:                         "EXPAND_VOLUME is not announced: a volume has the size of its files",
	`Node Service NodeGet(Volume|Storage)Health`:            "GET_VOLUME_HEALTH and GET_STORAGE_HEALTH are not announced",
}

// forUs are all others.
var forUs = []string{
	"Identity Service GetPluginCapabilities should return appropriate capabilities",
	"Identity Service GetPluginInfo should return appropriate information",
	"Identity Service Probe should return appropriate information",
	"Node Service NodeGetCapabilities should return appropriate capabilities",
	"Node Service NodeGetInfo should return appropriate values",
	"Node Service NodePublishVolume should fail when no target path is provided",
	"Node Service NodePublishVolume should fail when no volume capability is provided",
	"Node Service NodePublishVolume should fail when no volume id is provided",
	"Node Service NodeUnpublishVolume should fail when no target path is provided",
	"Node Service NodeUnpublishVolume should fail when no volume id is provided",
	"Node Service NodeUnpublishVolume should remove target path",
	"Node Service should be idempotent",
	"Node Service should work",
}

// The suite of the CSI community against the driver on the node, with a volume of a Pod that runs there.
func TestCSISanity(t *testing.T) {
	ns := beside(t)
	ns.target("sanity", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.pod("pod", mountTarget)
	ns.running("pod")
	uid := ns.uid("pod")
	token := ns.kubectl("create", "token", "default", "--bound-object-kind=Pod", "--bound-object-name=pod",
		"--bound-object-uid="+uid)
	tokens, err := json.Marshal(map[string]any{"": map[string]string{"token": token}})
	if err != nil {
		t.Fatal(err)
	}

	config := sanity.NewTestConfig()
	config.Address = "unix:/var/lib/kubelet/plugins_registry/connectors-csi-reg.sock"
	config.TargetPath = filepath.Dir(cluster.VolumeDir(uid, "sanity"))
	config.StagingPath = ""
	config.CheckPath = func(path string) (sanity.PathKind, error) {
		if machine.Exists(targetPath(path)) {
			return sanity.PathIsDir, nil
		}
		return sanity.PathIsNotFound, nil
	}
	config.DialOptions = append(config.DialOptions, grpc.WithUnaryInterceptor(inlineVolume{
		"csi.storage.k8s.io/pod.name": "pod", "csi.storage.k8s.io/pod.namespace": ns.name, "csi.storage.k8s.io/pod.uid": uid,
		"csi.storage.k8s.io/serviceAccount.name": "default", "csi.storage.k8s.io/serviceAccount.tokens": string(tokens),
		"csi.storage.k8s.io/ephemeral": "true", "connector.name": "target", "configuration.names": "config",
	}.call))

	suite, reporter := ginkgo.GinkgoConfiguration()
	reporter.NoColor, reporter.Succinct = true, true
	for name := range notForUs {
		suite.SkipStrings = append(suite.SkipStrings, name)
	}
	var passed, others []string
	ginkgo.ReportAfterEach(func(spec types.SpecReport) {
		switch name := spec.FullText(); {
		case spec.State == types.SpecStatePassed:
			passed = append(passed, name)
		case spec.State == types.SpecStatePending: // by its authors
		case spec.State != types.SpecStateSkipped || spec.Failure.Message != "":
			others = append(others, name+": "+spec.State.String()+": "+spec.Failure.Message)
		}
	})
	gomega.RegisterFailHandler(ginkgo.Fail)
	context := sanity.GinkgoTest(&config)
	defer context.Finalize()
	ginkgo.RunSpecs(t, "CSI", suite, reporter)
	slices.Sort(passed)
	t.Logf("of the suite passed:\n%s", strings.Join(passed, "\n"))
	if !slices.Equal(passed, forUs) || len(others) > 0 {
		t.Errorf("other tests are expected to pass:\n%s\nand these did not:\n%s", strings.Join(forUs, "\n"),
			strings.Join(others, "\n"))
	}
	if dir := config.TargetPath; machine.Exists(dir) {
		t.Errorf("%s is left", dir)
	}
	ns.want("pod", "/volume/address", "https://one.example.com")
}

// inlineVolume stands between the suite and the driver, and adds what the suite cannot say of an inline volume. It is
// the volume's context.
type inlineVolume map[string]string

// call takes the place of a controller, since the suite asks one for each volume that it publishes; an inline volume
// comes from its Pod. All other calls go to the driver.
func (v inlineVolume) call(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn,
	invoke grpc.UnaryInvoker,
	options ...grpc.CallOption) error {
	switch r := request.(type) {
	case *csi.CreateVolumeRequest:
		reply.(*csi.CreateVolumeResponse).Volume = &csi.Volume{VolumeId: r.Name, VolumeContext: v}
		return nil
	case *csi.DeleteVolumeRequest, *csi.ControllerGetCapabilitiesRequest:
		return nil
	case *csi.GetPluginCapabilitiesRequest:
		service := &csi.PluginCapability_Service{Type: csi.PluginCapability_Service_CONTROLLER_SERVICE}
		capabilities := &reply.(*csi.GetPluginCapabilitiesResponse).Capabilities
		err := invoke(ctx, method, request, reply, conn, options...)
		*capabilities = append(*capabilities, &csi.PluginCapability{Type: &csi.PluginCapability_Service_{Service: service}})
		return err
	case *csi.NodePublishVolumeRequest:
		r = proto.Clone(r).(*csi.NodePublishVolumeRequest)
		r.Readonly, r.TargetPath = true, targetPath(r.TargetPath)
		request = r
	case *csi.NodeUnpublishVolumeRequest:
		r = proto.Clone(r).(*csi.NodeUnpublishVolumeRequest)
		r.TargetPath = targetPath(r.TargetPath)
		request = r
	}
	return invoke(ctx, method, request, reply, conn, options...)
}

// targetPath is what kubelet calls a path that the suite ends with "/target".
func targetPath(path string) string {
	if dir, ok := strings.CutSuffix(path, "/target"); ok {
		return dir + "/mount"
	}
	return path
}
