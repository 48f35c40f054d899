package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ---- The contract of a volume ----

func TestPublishMountsTheDocumentedExample(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume(attrs{"connector.name": "git", "connector.namespace": "default", "configuration.names": "config"})
	v.mustPublish()
	v.wantFiles(".gitconfig", "mark", "token")
	v.want("token", v.pod.token)
	basic := base64.StdEncoding.EncodeToString([]byte(":" + v.pod.token))
	v.want(".gitconfig", "[http]\n\textraHeader = Authorization: Basic "+basic+
		"\n[url \"http://c-git.default.svc.cluster.local\"]\n\tinsteadOf = https://git.example.com\n")
	v.mustUnpublish()
}

func TestAttributesAccepted(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(connector("team-a", "git", "git"), connector("team-a", "with.dots-1", "git"))
	for what, attributes := range sorted(map[string]attrs{
		"namespace":                     {"connector.namespace": "team-a"},
		"name with dots":                {"connector.namespace": "team-a", "connector.name": "with.dots-1"},
		"empty namespace is the Pod's":  {"connector.namespace": ""},
		"empty values are as no values": {"connectors": "", "configuration.params": "", "token.expiration": ""},
		"spaces around names":           {"configuration.names": " config ,  first "},
		"empty items":                   {"configuration.names": ",config,,"},
		"connectors":                    {"connector.name": "-", "connectors": "git"},
		"connectors with namespace":     {"connector.name": "", "connectors": " team-a/git , git"},
		"the default expiration":        {"token.expiration": "30m"},
		"an equal one":                  {"token.expiration": "0.5h"},
		"less than a second more":       {"token.expiration": "30m0.9s"},
		"params that are null":          {"configuration.params": `{"config": null, "another": null}`},
		"as many bytes as possible": {"configuration.params": strings.Repeat(" ",
			32<<10-2-len("connector.namegitconfiguration.namesconfigconfiguration.params")) + "{}"},
	}) {
		t.Run(what, func(t *testing.T) {
			v := n.volume(attributes)
			v.t = t
			v.mustPublish()
			v.want("token", v.pod.token)
			v.mustUnpublish()
		})
	}
}

func TestAttributesRefused(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	for what, c := range sorted(map[string]struct {
		attributes attrs
		words      []string
	}{
		"no Connector":    {attrs{"connector.name": "-"}, []string{"connectors or connector.name is required"}},
		"empty Connector": {attrs{"connector.name": ""}, []string{"connectors or connector.name is required"}},
		"list of nothing": {attrs{"connector.name": "-", "connectors": " , "},
			[]string{"connectors or connector.name is required"}},
		"both ways": {attrs{"connectors": "git"}, []string{"connectors cannot be combined with connector.name"}},
		"list and namespace": {attrs{"connector.name": "-", "connectors": "git", "connector.namespace": "default"},
			[]string{"cannot be combined"}},
		"the same twice": {attrs{"connector.name": "-", "connectors": "git,default/git"},
			[]string{`"default/git" twice`}},
		"no configuration":    {attrs{"configuration.names": "-"}, []string{"configuration.names is missing"}},
		"empty configuration": {attrs{"configuration.names": ""}, []string{"configuration.names is missing"}},
		"only spaces":         {attrs{"configuration.names": " , "}, []string{"configuration.names is missing"}},
		"only exclusions":     {attrs{"configuration.names": "!token"}, []string{"configuration.names is missing"}},
		"singular": {attrs{"configuration.name": "config"},
			[]string{`"configuration.name"`, "known are ", "configuration.names", "connector.namespace", "token.expiration"}},
		"singular Connector":    {attrs{"connector": "git"}, []string{`unknown attribute "connector"`}},
		"other spelling":        {attrs{"tokenExpiration": "1h"}, []string{`unknown attribute "tokenExpiration"`}},
		"capital":               {attrs{"connector.Name": "git"}, []string{`unknown attribute "connector.Name"`}},
		"duration without unit": {attrs{"token.expiration": "30"}, []string{`token.expiration "30"`, "10m"}},
		"not a duration":        {attrs{"token.expiration": "long"}, []string{`token.expiration "long"`}},
		"short duration":        {attrs{"token.expiration": "9m59s"}, []string{`token.expiration "9m59s"`, "at least 10m"}},
		"negative duration":     {attrs{"token.expiration": "-1h"}, []string{"token.expiration"}},
		"path as name":          {attrs{"connector.name": "../../secrets"}, []string{"DNS names"}},
		"path as namespace":     {attrs{"connector.namespace": ".."}, []string{"DNS names"}},
		"encoded slash":         {attrs{"connector.name": "a%2fb"}, []string{"DNS names"}},
		"query":                 {attrs{"connector.name": "git?watch=1"}, []string{"DNS names"}},
		"capitals":              {attrs{"connector.name": "Git"}, []string{"DNS names"}},
		"space":                 {attrs{"connector.name": "git "}, []string{"DNS names"}},
		"line break":            {attrs{"connector.name": "git\n"}, []string{"DNS names"}},
		"empty label":           {attrs{"connector.name": "a..b"}, []string{"DNS names"}},
		"dash at the end":       {attrs{"connector.name": "git-"}, []string{"DNS names"}},
		"dot in namespace":      {attrs{"connector.namespace": "a.b"}, []string{"DNS names"}},
		"long namespace":        {attrs{"connector.namespace": strings.Repeat("a", 64)}, []string{"DNS names"}},
		"long name":             {attrs{"connector.name": strings.Repeat("a.", 126) + "aa"}, []string{"DNS names"}},
		"paths in the list":     {attrs{"connector.name": "-", "connectors": "default/git/.."}, []string{"DNS names"}},
		"no name in the list":   {attrs{"connector.name": "-", "connectors": "default/"}, []string{"DNS names"}},
		"no namespace":          {attrs{"connector.name": "-", "connectors": "/git"}, []string{"DNS names"}},
		"params no JSON":        {attrs{"configuration.params": "{"}, []string{"configuration.params is not a JSON object"}},
		"params two values": {attrs{"configuration.params": "{} {}"},
			[]string{"configuration.params is not a JSON object"}},
		"params list": {attrs{"configuration.params": `[]`}, []string{"configuration.params is not a JSON object"}},
		"params null": {attrs{"configuration.params": `null`},
			[]string{"configuration.params is not a JSON object"}},
		"params string": {attrs{"configuration.params": `{"config":"x"}`}, []string{`"config" is not a JSON object`}},
		"params of another": {attrs{"configuration.params": `{"first":{}}`},
			[]string{`"first"`, "not in configuration.names"}},
		"params too deep": {attrs{"configuration.params": `{"config":` + strings.Repeat("[", 15000) +
			strings.Repeat("]", 15000) + "}"},
			[]string{"configuration.params is not a JSON object", "exceeded max depth at byte 10010)"}},
		"one byte too many": {attrs{"configuration.params": strings.Repeat(" ",
			32<<10-1-len("connector.namegitconfiguration.namesconfigconfiguration.params")) + "{}"},
			[]string{"volumeAttributes may have 32768 bytes, not 32769", "make them smaller"}},
		"a long key": {attrs{"connectors" + strings.Repeat("k", 30000): ""},
			[]string{`unknown attribute "connectors` + strings.Repeat("k", 190) + ` …"`}},
		"33 Connectors": {attrs{"connector.name": "-", "connectors": numbered("c", 33)},
			[]string{"connectors may name 32 Connectors, not 33"}},
		"65 configurations": {attrs{"configuration.names": numbered("c", 65)},
			[]string{"configuration.names may have 64 configurations and as many exclusions, not 65"}},
		"65 exclusions": {attrs{"configuration.names": "config," + numbered("!f", 65)},
			[]string{"configuration.names may have 64 configurations and as many exclusions, not 65"}},
		"a configuration twice": {attrs{"configuration.names": "config, first, config"},
			[]string{`configuration.names has "config" twice`}},
		"an exclusion twice": {attrs{"configuration.names": "config,!a,! a"},
			[]string{`configuration.names has "a" twice`}},
		"long configuration": {attrs{"configuration.names": strings.Repeat("x", 254)},
			[]string{"configuration.names: a name may have 253 bytes, not 254"}},
		"more than a day": {attrs{"token.expiration": "24h0m1s"},
			[]string{"token.expiration may be at most 24h0m0s, not 24h0m1s"}},
		"45 years": {attrs{"token.expiration": "400000h"}, []string{"token.expiration may be at most 24h0m0s"}},
		"more than a Duration": {attrs{"token.expiration": "9999999h"},
			[]string{`token.expiration "9999999h" is not a duration`}},
		"3607 seconds": {attrs{"token.expiration": "1h0m7s"},
			[]string{"token.expiration may not be 1h0m7s", "3607 seconds", "a year"}},
		"nearly 3608 seconds": {attrs{"token.expiration": "3607.999s"}, []string{"token.expiration may not be 1h0m7s"}},
		"nearly ten minutes":  {attrs{"token.expiration": "9m59.999s"}, []string{"at least 10m"}},
	}) {
		t.Run(what, func(t *testing.T) {
			v := n.volume(c.attributes)
			v.t = t
			v.mustRefuse(codes.InvalidArgument, c.words...)
		})
	}
	if n.api.count("") > 0 {
		t.Error("the API server was asked for one of them")
	}
}

// numbered is a list of so many names.
func numbered(name string, count int) string {
	var names []string
	for i := range count {
		names = append(names, fmt.Sprint(name, i))
	}
	return strings.Join(names, ",")
}

// A volume may have as many names as the limits say.
func TestAsManyNamesAsAllowed(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	var configurations []object
	var files, connectors []string
	for i := range 64 {
		files = append(files, fmt.Sprint("file", i))
		configurations = append(configurations, configuration(fmt.Sprint("c", i), files[i], "x"))
	}
	for i := range 32 {
		connectors = append(connectors, fmt.Sprint("git", i))
		n.api.put(connector("default", connectors[i], "many"))
	}
	n.api.put(class("many", append(configurations, configuration("one", "stays", "{{ len .connectors }}"))...))
	v := n.volume(attrs{"connector.name": "-", "connectors": strings.Join(connectors, ","),
		"configuration.names": "one," + numbered("c", 63) + ",!" + strings.Join(files[:63], ",!")})
	v.mustPublish()
	v.wantFiles("stays")
	v.want("stays", "32")
}

// The limits of new volumes do not end one that is mounted: its Pod would be left with an old token.
func TestMountedVolumesMayHaveMoreThanNewOnes(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	v.mustPublish()
	v.attributes["configuration.names"] = "first,config,first,!one,!one" + strings.Repeat(",", 33<<10)
	v.attributes["token.expiration"] = "48h"
	v.change = func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().FsType = "ext4" }
	v.mustPublish()
	v.wantFiles(".gitconfig", "mark", "shared", "token")
	if got := valueAt(n.api.lastBody(tokenPath("default", "default")), "spec", "expirationSeconds"); got != 86400. {
		t.Errorf("a token of %v seconds was asked for, not of a day", got)
	}
	other := n.volume(v.attributes)
	other.change = v.change
	other.mustRefuse(codes.InvalidArgument, "fs_type")
}

// A message that is too large never gets into the driver's hands.
func TestLargestMessage(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	v.change = func(r *csi.NodePublishVolumeRequest) { r.Secrets["more"] = strings.Repeat("x", 120<<10) }
	v.mustPublish()
	v.mustUnpublish()
	v.change = func(r *csi.NodePublishVolumeRequest) { r.Secrets["more"] = strings.Repeat("x", 128<<10) }
	v.mustRefuse(codes.ResourceExhausted, "received message larger than max", "131072")
	v.change = nil
	v.mustPublish()
}

// What is kept of a volume is no more than is needed to publish it again.
func TestMemoryOfVolumes(t *testing.T) {
	n := startNode(t)
	held := func() int {
		runtime.GC() // twice, for what is in a sync.Pool
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	large := func(r *csi.NodePublishVolumeRequest) {
		r.Secrets["of nodePublishSecretRef"] = strings.Repeat("x", 80<<10)
		r.VolumeContext["configuration.names"] = "config" + strings.Repeat(",", 30<<10)
		r.PublishContext = attrs{"more": strings.Repeat("x", 10<<10)}
	}
	first := n.volume()
	first.change = large
	first.settle()
	n.log.reserve(1 << 20) // what this test logs is not the driver's
	before := held()
	for range 60 {
		v := n.volume()
		v.change = large
		v.settle()
	}
	if grown := held() - before; grown > 1<<20 {
		t.Errorf("60 volumes hold %d KiB", grown>>10)
	}
}

func TestLaterConfigurationWins(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	for names, want := range sorted(map[string]string{"first,second": "from second", "second,first": "from first"}) {
		v := n.volume(attrs{"configuration.names": names})
		v.mustPublish()
		v.wantFiles("one", "shared", "two")
		v.want("shared", want)
	}
}

func TestRequestsRefused(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	other := n.pod()
	for what, c := range sorted(map[string]struct {
		change func(*csi.NodePublishVolumeRequest)
		code   codes.Code
		words  string
	}{
		"not read-only": {func(r *csi.NodePublishVolumeRequest) { r.Readonly = false }, codes.InvalidArgument,
			"csi.readOnly: true"},
		"no volume id": {func(r *csi.NodePublishVolumeRequest) { r.VolumeId = "" }, codes.InvalidArgument, "volume_id"},
		"no capability": {func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = nil }, codes.InvalidArgument,
			"volume_capability"},
		"block": {func(r *csi.NodePublishVolumeRequest) {
			r.VolumeCapability.AccessType = &csi.VolumeCapability_Block{}
		}, codes.InvalidArgument, "volume_capability"},
		"group":            {group("staff"), codes.InvalidArgument, `volume_mount_group "staff"`},
		"negative group":   {group("-1"), codes.InvalidArgument, `volume_mount_group "-1"`},
		"too high a group": {group("2147483648"), codes.InvalidArgument, `volume_mount_group "2147483648"`},
		"no access mode": {func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.AccessMode = nil },
			codes.InvalidArgument, "no access_mode"},
		"unknown mode": {func(r *csi.NodePublishVolumeRequest) {
			r.VolumeCapability.AccessMode.Mode = csi.VolumeCapability_AccessMode_UNKNOWN
		}, codes.InvalidArgument, "no access_mode"},
		"file system": {fsType("ext4"), codes.InvalidArgument,
			`fs_type "ext4": the volume is a tmpfs; leave csi.fsType out`},
		"mount flags": {mountFlags("exec", "dev"), codes.InvalidArgument,
			`mount_flags "exec": mount options are not supported`},
		"persistent": {podInfo("ephemeral", "false"), codes.InvalidArgument,
			`csi.storage.k8s.io/ephemeral is "false": only inline volumes can be mounted`},
		"not ephemeral":   {podInfo("ephemeral", ""), codes.InvalidArgument, `csi.storage.k8s.io/ephemeral is ""`},
		"other Pod":       {podInfo("pod.name", other.name), codes.PermissionDenied, "pod.name"},
		"other namespace": {podInfo("pod.namespace", "kube-system"), codes.PermissionDenied, "pod.namespace"},
		"other uid":       {podInfo("pod.uid", other.uid), codes.PermissionDenied, "pod.uid"},
		"other account":   {podInfo("serviceAccount.name", "admin"), codes.PermissionDenied, "serviceAccount.name"},
		"huge token": {tokens(`{"":{"token":"` + strings.Repeat("x", 16<<10+1) + `"}}`), codes.InvalidArgument,
			"more than 16 KiB"},
		"no token":       {tokens(""), codes.FailedPrecondition, "tokenRequests"},
		"no JSON":        {tokens("eyJ"), codes.FailedPrecondition, "tokenRequests"},
		"other audience": {tokens(`{"vault":{"token":"` + other.token + `"}}`), codes.FailedPrecondition, "tokenRequests"},
		"empty token":    {tokens(`{"":{"token":""}}`), codes.FailedPrecondition, "tokenRequests"},
		"no JWT":         {tokens(`{"":{"token":"secret"}}`), codes.InvalidArgument, "not one of a Pod's ServiceAccount"},
		"no base64":      {tokens(`{"":{"token":"a.!.c"}}`), codes.InvalidArgument, "not one of a Pod's ServiceAccount"},
		"no claims": {tokens(`{"":{"token":"e30.e30.e30"}}`), codes.InvalidArgument,
			"not one of a Pod's ServiceAccount"},
		"token of no Pod": {tokens(`{"":{"token":"` + issue("default", "default", nil, time.Hour, apiAudience) + `"}}`),
			codes.InvalidArgument, "not one of a Pod's ServiceAccount"},
		"another's token": {tokens(`{"":{"token":"` + other.token + `"}}`), codes.PermissionDenied, "the token is that of"},
	}) {
		t.Run(what, func(t *testing.T) {
			v := n.volume()
			v.t, v.change = t, c.change
			v.mustRefuse(c.code, c.words)
		})
	}
	if n.api.count("") > 0 {
		t.Error("the API server was asked for one of them")
	}
}

func group(gid string) func(*csi.NodePublishVolumeRequest) {
	return func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().VolumeMountGroup = gid }
}

func fsType(name string) func(*csi.NodePublishVolumeRequest) {
	return func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().FsType = name }
}

func mountFlags(flags ...string) func(*csi.NodePublishVolumeRequest) {
	return func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().MountFlags = flags }
}

func podInfo(key, value string) func(*csi.NodePublishVolumeRequest) {
	return func(r *csi.NodePublishVolumeRequest) { r.VolumeContext["csi.storage.k8s.io/"+key] = value }
}

func tokens(text string) func(*csi.NodePublishVolumeRequest) {
	return func(r *csi.NodePublishVolumeRequest) {
		r.Secrets = attrs{"csi.storage.k8s.io/serviceAccount.tokens": text}
	}
}

func TestTargetPathsRefused(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	outside := n.dir + "/elsewhere"
	must(t, os.MkdirAll(outside+"/mount", 0o755))
	must(t, os.WriteFile(outside+"/mount/precious", nil, 0o644))
	for what, target := range sorted(map[string]func(string) string{
		"none":            func(string) string { return "" },
		"relative":        func(target string) string { return target[1:] },
		"outside":         func(string) string { return outside + "/mount" },
		"dots to outside": func(target string) string { return filepath.Dir(target) + "/../../../../../elsewhere/mount" },
		"dots that stay":  func(target string) string { return filepath.Dir(target) + "/../config/mount" },
		"trailing slash":  func(target string) string { return target + "/" },
		"double slash":    func(target string) string { return strings.Replace(target, "/volumes", "//volumes", 1) },
		"deeper":          func(target string) string { return target + "/mount" },
		"higher":          filepath.Dir,
		"other plugin": func(target string) string {
			return strings.Replace(target, "kubernetes.io~csi", "kubernetes.io~secret", 1)
		},
		"other last name":   func(target string) string { return filepath.Dir(target) + "/globalmount" },
		"the pods dir":      func(string) string { return n.podsDir() },
		"uid that is a dot": func(target string) string { return n.podsDir() + "/./volumes/kubernetes.io~csi/config/mount" },
	}) {
		t.Run(what, func(t *testing.T) {
			v := n.volume()
			target := target(v.target)
			v.t, v.change = t, func(r *csi.NodePublishVolumeRequest) { r.TargetPath = target }
			v.mustRefuse(codes.InvalidArgument, "target_path")
			_, err := csi.NewNodeClient(n.conn).NodeUnpublishVolume(t.Context(),
				&csi.NodeUnpublishVolumeRequest{VolumeId: "csi-1", TargetPath: target})
			wantError(t, err, codes.InvalidArgument, "target_path")
		})
	}
	if _, err := os.Stat(outside + "/mount/precious"); err != nil || len(mountsBelow(n.dir)) > 0 {
		t.Error("a call did something elsewhere:", err, mountsBelow(n.dir))
	}
	v, another := n.volume(), n.volume()
	v.change = func(r *csi.NodePublishVolumeRequest) { r.TargetPath = another.target }
	v.mustRefuse(codes.PermissionDenied, "target path", another.pod.uid)
	another.wantNothing()
}

func TestTokenComesFromSecretsBeforeVolumeContext(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	older := v.pod.token
	v.pod.renewToken()
	text := `{"":{"token":"` + older + `"}}`
	v.change = podInfo("serviceAccount.tokens", text)
	v.mustPublish()
	v.want("token", v.pod.token)
	v.change = func(r *csi.NodePublishVolumeRequest) { // an older kubelet
		r.Secrets = nil
		r.VolumeContext["csi.storage.k8s.io/serviceAccount.tokens"] = text
	}
	v.mustPublish()
	v.want("token", older)
}

func TestPodInfoMayBeMissing(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	v.change = func(r *csi.NodePublishVolumeRequest) {
		r.VolumeContext = v.attributes
		fsType("tmpfs")(r)
	}
	v.mustPublish()
	v.want("token", v.pod.token)
}

func TestIdentityAndCapabilities(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	ctx := t.Context()
	identity, nodeClient := csi.NewIdentityClient(n.conn), csi.NewNodeClient(n.conn)
	plugin, err := identity.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
	if err != nil || plugin.Name != "connectors-csi" || plugin.VendorVersion == "" {
		t.Errorf("plugin info %v, %v", plugin, err)
	}
	capabilities, err := identity.GetPluginCapabilities(ctx, &csi.GetPluginCapabilitiesRequest{})
	if err != nil || len(capabilities.Capabilities) != 0 {
		t.Errorf("plugin capabilities %v, %v", capabilities, err)
	}
	info, err := nodeClient.NodeGetInfo(ctx, &csi.NodeGetInfoRequest{})
	if err != nil || info.NodeId != "node-1" {
		t.Errorf("node info %v, %v", info, err)
	}
	node, err := nodeClient.NodeGetCapabilities(ctx, &csi.NodeGetCapabilitiesRequest{})
	if err != nil || len(node.Capabilities) != 1 ||
		node.Capabilities[0].GetRpc().GetType() != csi.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP {
		t.Errorf("node capabilities %v, %v", node, err)
	}
	_, err = nodeClient.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{})
	wantError(t, err, codes.Unimplemented)
	_, err = nodeClient.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{})
	wantError(t, err, codes.Unimplemented)
	_, err = nodeClient.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{TargetPath: n.volume().target})
	wantError(t, err, codes.InvalidArgument, "volume_id")
}

// ---- Errors that a user can meet ----

func TestObjectErrors(t *testing.T) {
	t.Parallel()
	for what, c := range sorted(map[string]struct {
		prepare func(*node)
		code    codes.Code
		words   []string
	}{
		"no Connector": {func(n *node) { n.api.remove(connectorPath("default", "git")) }, codes.NotFound,
			[]string{`Connector "default/git" not found`, "create it", "connector.name"}},
		"forbidden": {func(n *node) { n.api.forbid("default/default", connectorPath("default", "git")) },
			codes.PermissionDenied,
			[]string{"ServiceAccount default/default may not read", `Connector "default/git"`,
				`User "system:serviceaccount:default:default" cannot get`,
				"kubectl create rolebinding default.default-connectors --namespace=default " +
					"--clusterrole=connectors-connector-viewer-role --serviceaccount=default:default"}},
		"no class": {func(n *node) { n.api.remove(classPath("git")) }, codes.NotFound,
			[]string{`ConnectorClass "git" of Connector "default/git" not found`, "spec.connectorClassName"}},
		"class forbidden": {func(n *node) { n.api.forbid(driverUser, classPath("git")) }, codes.PermissionDenied,
			[]string{`the driver may not read ConnectorClass "git"`, "deploy.yaml"}},
		"no class named": {func(n *node) {
			n.api.put(connector("default", "git", "git",
				with(nil, "spec", "connectorClassName")))
		}, codes.FailedPrecondition,
			[]string{`Connector "default/git"`, "spec.connectorClassName"}},
		"class named by a path": {func(n *node) { n.api.put(connector("default", "git", "../namespaces/x")) },
			codes.FailedPrecondition,
			[]string{"spec.connectorClassName", "../namespaces/x"}},
		"no such configuration": {func(n *node) { n.api.put(class("git", configuration("one"), configuration("two"))) },
			codes.InvalidArgument,
			[]string{`configuration "config"`, `ConnectorClass "git" has: one, two`}},
		"no configuration at all": {func(n *node) { n.api.put(class("git")) }, codes.InvalidArgument,
			[]string{`ConnectorClass "git" has: none`}},
		"template does not parse": {func(n *node) { n.api.put(gitClassOf("a", "ok\n{{ if }}")) }, codes.FailedPrecondition,
			[]string{`ConnectorClass "git", configuration "config": a line 2: missing value for if`}},
		"unknown function": {func(n *node) { n.api.put(gitClassOf("a", "{{ getHostByName \"x\" }}")) },
			codes.FailedPrecondition,
			[]string{`"getHostByName" not defined`}},
		"template fails": {func(n *node) { n.api.put(gitClassOf("a", "1\n2\n{{ fail \"sorry\" }}")) },
			codes.FailedPrecondition,
			[]string{`a line 3: {{ fail "sorry" }}: sorry`}},
		"missing value": {func(n *node) {
			n.api.put(gitClassOf("a", "x\n{{ .connector.spec.project }}"))
		}, codes.FailedPrecondition,
			[]string{`ConnectorClass "git", configuration "config": a line 2: {{ .connector.spec.project }} has no value`}},
		"no proxy address": {func(n *node) { n.api.put(connector("default", "git", "git", with(nil, "status"))) },
			codes.FailedPrecondition,
			[]string{".gitconfig line 3: {{ .connector.status.proxyAddress }} has no value",
				"Connector default/git has no proxy address yet", "status.proxy.httpAddress.url", "wait"}},
		"bad file name": {func(n *node) { n.api.put(gitClassOf("../a", "")) }, codes.FailedPrecondition,
			[]string{`file name "../a" is not allowed`, "must not begin with '..'"}},
		"too large": {func(n *node) { n.api.put(gitClassOf("a", "{{ repeat 1048577 \"x\" }}")) }, codes.FailedPrecondition,
			[]string{`file "a"`, "1024 KiB"}},
		"too large together": {func(n *node) {
			n.api.put(gitClassOf("a", `{{ repeat 1048000 "x" }}`, "b", `{{ repeat 577 "x" }}`))
		},
			codes.FailedPrecondition, []string{`file "b"`, "1024 KiB"}},
		"template is no string": {func(n *node) { n.api.put(class("git", object{"name": "config", "data": object{"a": 1}})) },
			codes.FailedPrecondition,
			[]string{`file "a"`, "not a string"}},
		"token request forbidden": {func(n *node) {
			n.api.set(func() { n.api.noTokens = true })
			n.api.put(connector("default", "git", "git",
				with("http://c-git.default.svc.cluster.local", "status", "proxy", "httpAddress", "audience")))
		}, codes.PermissionDenied, []string{"may not request a token for ServiceAccount default/default",
			"ClusterRole connectors-csi-token", "token.expiration"}},
		"Pod gone": {func(n *node) {
			n.api.set(func() { clear(n.api.podUIDs) })
			n.api.put(connector("default", "git", "git",
				with("http://c-git.default.svc.cluster.local", "status", "proxy", "httpAddress", "audience")))
		}, codes.Aborted, []string{"does not match the UID in record"}},
	}) {
		t.Run(what, func(t *testing.T) {
			n := startNode(t)
			v := n.volume()
			c.prepare(n)
			v.mustRefuse(c.code, c.words...)
		})
	}
}

func TestManyFiles(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	var data []string
	for i := range 256 {
		data = append(data, fmt.Sprintf("%s-%d", strings.Repeat("long-name", 12), i), "x")
	}
	n.api.put(gitClassOf(data...))
	v := n.volume()
	v.mustPublish()
	if got := len(v.read()); got != 256 {
		t.Errorf("%d files", got)
	}
	v.mustUnpublish()
	n.api.put(gitClassOf(append(data, "one-more", "x")...))
	n.volume().mustRefuse(codes.FailedPrecondition, "in 256 files")
}

// The largest volume fits into its tmpfs, and so does its update by another one as large.
func TestLargestVolume(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	large := func(letter string) object {
		var data []string
		for i := range 256 {
			data = append(data, fmt.Sprintf("%s-%d", strings.Repeat(letter, 100), i), strings.Repeat(letter, 4096))
		}
		return gitClassOf(data...)
	}
	n.api.put(large("a"))
	v := n.volume()
	v.mustPublish()
	n.api.put(large("b"))
	n.age()
	v.mustPublish()
	v.wantClean()
	v.want(strings.Repeat("b", 100)+"-7", strings.Repeat("b", 4096))
}

func TestAPIServerErrors(t *testing.T) {
	t.Parallel()
	for what, c := range sorted(map[string]struct {
		code   int
		body   string
		header []string
		want   codes.Code
		words  string
	}{
		"401": {401, statusBody(401, "Unauthorized", "Unauthorized"), nil, codes.Unauthenticated,
			"Unauthorized (HTTP 401"},
		"403": {403, statusBody(403, "Forbidden", "not for you"), nil, codes.PermissionDenied, "not for you"},
		"404": {404, statusBody(404, "NotFound", "nobody knows it"), nil, codes.NotFound, "nobody knows it"},
		"409": {409, statusBody(409, "Conflict", "another change"), nil, codes.Aborted, "another change"},
		"429": {429, statusBody(429, "TooManyRequests", "slow down"), nil, codes.ResourceExhausted, "slow down"},
		"429 for an hour": {429, statusBody(429, "TooManyRequests", "slow down"), []string{"Retry-After", "3600"},
			codes.ResourceExhausted, "slow down"},
		"500":              {500, statusBody(500, "InternalError", "etcd is gone"), nil, codes.Unavailable, "etcd is gone"},
		"503":              {503, "", nil, codes.Unavailable, "Service Unavailable (HTTP 503"},
		"502 of a proxy":   {502, "<html>" + fileMark + "</html>", nil, codes.Unavailable, "Bad Gateway (HTTP 502"},
		"error, no Status": {400, `{"message":"` + fileMark + `"}`, nil, codes.InvalidArgument, "Bad Request"},
		"garbage":          {200, "<html>" + fileMark + "</html>", nil, codes.Unavailable, "not a Kubernetes object"},
		"list":             {200, `["` + fileMark + `"]`, nil, codes.Unavailable, "not a Kubernetes object"},
		"half an object":   {200, `{"metadata":{`, nil, codes.Unavailable, "not a Kubernetes object"},
		"nothing":          {200, "", nil, codes.Unavailable, "not a Kubernetes object"},
		"null":             {200, "null", nil, codes.Unavailable, "not a Kubernetes object"},
		"too much": {200, `{"a":"` + strings.Repeat("x", 3<<20) + `"}`, nil, codes.FailedPrecondition,
			"more than 3072 KiB"},
		"no class in it": {200, "{}", nil, codes.FailedPrecondition, "spec.connectorClassName"},
		"long message": {500, statusBody(500, "InternalError", "%s", strings.Repeat("ü", 2000)), nil, codes.Unavailable,
			"…"},
	}) {
		t.Run(what, func(t *testing.T) {
			n := startNode(t)
			n.api.answer("/connectors/", c.code, c.body, c.header...)
			v := n.volume()
			v.mustRefuse(c.want, `onnector "default/git"`, c.words)
			if err := v.publish(); len(status.Convert(err).Message()) > 1020 || !utf8.ValidString(err.Error()) {
				t.Errorf("an event cannot hold %d bytes: %v", len(err.Error()), err)
			}
			n.api.answer("", 0, "")
			v.mustPublish()
		})
	}
}

func TestAPIServerErrorsForClassAndToken(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume(attrs{"token.expiration": "1h"})
	n.api.answer("/connectorclasses/", 500, statusBody(500, "InternalError", "etcd is gone"))
	v.mustRefuse(codes.Unavailable, `ConnectorClass "git" of Connector "default/git" cannot be read`, "etcd is gone")
	if n.api.count(tokenPath("default", "default")) > 0 {
		t.Error("a token was asked for before the objects were read")
	}
	n.api.answer("/token", 500, statusBody(500, "InternalError", "no key"))
	v.mustRefuse(codes.Unavailable, "no token of 1h0m0s for ServiceAccount default/default", "no key")
	n.api.answer("/token", 201, `{"status":{}}`)
	v.mustRefuse(codes.Unavailable, "the answer to the TokenRequest has no token")
	n.api.answer("/token", 201, `{"status":{"token":"`+strings.Repeat("x", 17<<10)+`"}}`)
	v.mustRefuse(codes.Unavailable, "the answer to the TokenRequest has no token")
	n.api.answer("", 0, "")
	v.mustPublish()
}

func TestRetryAfterIsHonoured(t *testing.T) {
	t.Parallel()
	for _, seconds := range []string{"0", "1"} { // the least is a second
		n := startNode(t)
		var first time.Time
		n.api.set(func() {
			n.api.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if !first.IsZero() {
					return false
				}
				first = time.Now()
				w.Header().Set("Retry-After", seconds)
				w.WriteHeader(http.StatusTooManyRequests)
				return true
			}
		})
		n.volume().mustPublish()
		if waited := time.Since(first); waited < time.Second {
			t.Errorf("Retry-After: %s: it came again after %v", seconds, waited)
		}
	}
}

func TestRedirectIsNotFollowed(t *testing.T) {
	t.Parallel()
	n, thief := startNode(t), newAPIServer(t)
	n.api.answer("/connectors/", http.StatusFound, "", "Location", thief.URL+"/x")
	n.volume().mustRefuse(codes.Unavailable, "HTTP 302")
	if thief.count("") > 0 {
		t.Error("the token went to another server")
	}
}

func TestAPIServerDown(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	n.api.Close()
	v.mustRefuse(codes.Unavailable, `Connector "default/git" cannot be read`, "no answer from the API server",
		"connection refused")
}

func TestAPIServerSlow(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	gate := n.api.hold("/connectors/")
	wantError(t, v.publishWithin(100*time.Millisecond), codes.DeadlineExceeded)
	v.wantNothing()
	gate.open()
	eventually(t, "the call that was given up leaves the target", func() bool { return v.publish() == nil })
	v.mustPublish()
}

func TestAnotherServersCertificate(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	authority := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true,
		NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, authority, authority, key.Public(), key)
	must(t, err)
	must(t, os.WriteFile(n.serviceAccount()+"/ca.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		0o644))
	n.start()
	n.volume().mustRefuse(codes.Unavailable, "no answer from the API server", "certificate signed by unknown authority")
	if n.api.count("") > 0 {
		t.Error("a token went to it")
	}
}

// ---- Several Connectors, parameters, exclusions, built-in files ----

func TestSeveralConnectors(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	see := "{{ .connector.name }}:{{ range .connectors }} {{ .namespace }}/{{ .name }}={{ .spec.address }}{{ end }} {{ " +
		".connectorclass.proxyAddress | default \"none\" }}"
	a, b := class("a", configuration("both", "both", "a: "+see, "a", see), configuration("only-a", "x", "from a")),
		class("b", configuration("both", "both", "b: "+see, "b", see))
	with("http://proxy-of-b", "status", "proxy", "httpAddress", "url")(b)
	n.api.put(a, b, connector("default", "a1", "a"), connector("team-a", "a2", "a"), connector("team-a", "b1", "b"))

	v := n.volume(attrs{"connector.name": "-", "connectors": "a1, team-a/b1 ,team-a/a2",
		"configuration.names": "both,only-a"})
	v.mustPublish()
	v.wantFiles("a", "b", "both", "x")
	ofA := "a1: default/a1=https://a1.example.com team-a/a2=https://a2.example.com none"
	ofB := "b1: team-a/b1=https://b1.example.com http://proxy-of-b"
	v.want("a", ofA)
	v.want("b", ofB)
	v.want("both", "b: "+ofB) // class b is named later
	v = n.volume(attrs{"connector.name": "-", "connectors": "team-a/b1,a1,team-a/a2", "configuration.names": "both"})
	v.mustPublish()
	v.want("both", "a: "+ofA)

	n.volume(attrs{"connector.name": "-", "connectors": "a1,team-a/b1", "configuration.names": "both,none"}).
		mustRefuse(codes.InvalidArgument, `"none"`, `ConnectorClass "a" has: both, only-a; ConnectorClass "b" has: both`)
	n.api.forbid("default/default", connectorPath("team-a", "b1"))
	n.volume(attrs{"connector.name": "-", "connectors": "a1,team-a/b1", "configuration.names": "both"}).
		mustRefuse(codes.PermissionDenied, `may not read Connector "team-a/b1"`, "--namespace=team-a",
			"--serviceaccount=default:default")
	n.volume(attrs{"connector.name": "-", "connectors": "a1,team-a/none",
		"configuration.names": "both"}).mustRefuse(codes.NotFound, `"team-a/none"`)
}

func TestConfigurationParams(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	declared := configuration("config", "file", `{{ range $k, $v := .configurations }}{{ $k }}={{ $v }};{{ end }}`)
	declared["params"] = []any{
		param("kind", "enum", []any{"mirror", "publish"}, "default", "mirror"),
		param("list", "type", "array", "enum", []any{"a", "b", 3}, "default", []any{"a"}),
		param("map", "type", "object", "default", object{}),
		param("name"),
		param("empty", "default", ""),
	}
	n.api.put(class("git", declared, configuration("other", "other", `{{ .configurations.name | default "none" }}`)))
	defaults := "empty=;kind=mirror;list=[a];map=map[];name=n;"
	for params, want := range sorted(map[string]string{
		`{"config":{"name":"n"}}`:                                 defaults,
		`{"config":{"name":"n","kind":"publish","empty":"e"}}`:    "empty=e;kind=publish;list=[a];map=map[];name=n;",
		`{"config":{"name":"n","list":["b",3]}}`:                  "empty=;kind=mirror;list=[b 3];map=map[];name=n;",
		`{"config":{"name":"n","map":{"x":1}}}`:                   "empty=;kind=mirror;list=[a];map=map[x:1];name=n;",
		`{"config":{"name":"n","undeclared":{"x":[true]}}}`:       defaults + "undeclared=map[x:[true]];",
		`{"config":{"name":"n"},"other":{"name":"of the other"}}`: defaults,
		` {"config" : {"name":"n", "kind": null} } `:              defaults,
	}) {
		v := n.volume(attrs{"configuration.params": params, "configuration.names": "config,other"})
		v.mustPublish()
		v.want("file", want)
		if strings.Contains(params, "of the other") {
			v.want("other", "of the other")
		}
	}
	for params, word := range sorted(map[string]string{
		"":                                         `required configuration param "name" is missing`,
		`{"config":{}}`:                            `required configuration param "name" is missing`,
		`{"config":{"name":null}}`:                 `required configuration param "name" is missing`,
		`{"config":{"name":1}}`:                    `configuration param "name" must be of type string, not integer`,
		`{"config":{"name":true}}`:                 `configuration param "name" must be of type string, not boolean`,
		`{"config":{"name":"n","kind":"none"}}`:    `configuration param "kind" must be one of [mirror publish], not "none"`,
		`{"config":{"name":"n","list":"a"}}`:       `configuration param "list" must be of type array, not string`,
		`{"config":{"name":"n","list":["a","c"]}}`: `configuration param "list" must be one of [a b 3], not "c"`,
		`{"config":{"name":"n","map":[]}}`:         `configuration param "map" must be of type object, not array`,
		`{"config":{"name":"n","kind":"` + strings.Repeat("x", 300) + `"}}`: `must be one of [mirror publish], not "` +
			strings.Repeat("x", 200) + ` …"`,
		`{"git":{}}`: "not in configuration.names: config",
	}) {
		n.volume(attrs{"configuration.params": params}).mustRefuse(codes.InvalidArgument, word)
	}
}

func TestExclusions(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume(attrs{"configuration.names": "first, ! one ,second"})
	v.mustPublish()
	v.wantFiles("shared", "two")
	v.attributes["configuration.names"] = "first,second,!two,!shared,!one"
	v.mustPublish()
	v.wantFiles()
	n.volume(attrs{"configuration.names": "first,!two"}).mustRefuse(codes.InvalidArgument, `excludes the file "two"`,
		"one, shared")
	n.volume(attrs{"configuration.names": "none,!one"}).mustRefuse(codes.InvalidArgument, `configuration "none"`)
}

func builtInFiles(d *driver) { d.builtInFiles = true }

func TestBuiltInFilesOfOneConnector(t *testing.T) {
	t.Parallel()
	n := startNode(t, builtInFiles)
	n.api.put(connector("default", "git", "git", with(certificate("the CA"), "status", "proxy", "httpAddress", "CACerts")))
	v := n.volume(attrs{"configuration.names": "-"})
	v.mustPublish()
	v.wantFiles(".curlrc", ".env", "ca.cert", "ca.crt", "connector.status.proxyAddress", "context.proxy.caCert",
		"context.token", "http.proxy", "https.proxy")
	proxy := "http://default%2Fgit:" + v.pod.token + "@c-git.default.svc.cluster.local:80"
	for name, want := range sorted(map[string]string{
		"context.token": v.pod.token, "connector.status.proxyAddress": "http://c-git.default.svc.cluster.local",
		"http.proxy": proxy, "https.proxy": proxy, ".curlrc": "proxy = " + proxy + "\n",
		"ca.crt": certificate("the CA"), "ca.cert": certificate("the CA"), "context.proxy.caCert": certificate("the CA"),
	}) {
		v.want(name, want)
	}
	v.wantEnvironment(proxy)
	v.attributes["configuration.names"] = "!context.token,config" // a class's file beside them, one left out
	v.mustPublish()
	if files := v.read(); len(files) != 8+3 || files["context.token"] != "" || files["token"] != v.pod.token {
		t.Errorf("files %v", slices.Sorted(maps.Keys(files)))
	}
	n.api.put(gitClassOf("ca.crt", "the class's own"))
	v = n.volume()
	v.mustPublish()
	v.want("ca.crt", "the class's own")
	v.want("ca.cert", certificate("the CA"))
}

// wantEnvironment sources the file .env as people do, and looks at the environment of a process.
func (v *podVolume) wantEnvironment(proxy string) {
	v.t.Helper()
	cmd := exec.Command("sh", "-c", "set -eau; . ./.env; exec env")
	cmd.Dir = v.target
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	out, err := runCommand(cmd)
	must(v.t, err)
	environment := strings.Split(out, "\n")
	for _, want := range []string{"http_proxy=" + proxy, "HTTP_PROXY=" + proxy, "https_proxy=" + proxy, "HTTPS_PROXY=" +
		proxy,
		"no_proxy=localhost,127.0.0.1", "NO_PROXY=localhost,127.0.0.1"} {
		if !slices.Contains(environment, want) {
			v.t.Errorf("no %s in %q", want, environment)
		}
	}
}

func TestBuiltInFilesOfSeveralConnectors(t *testing.T) {
	t.Parallel()
	n := startNode(t, builtInFiles)
	a, b := class("a"), class("b")
	with("http://proxy-a", "status", "proxy", "httpAddress", "url")(a)
	with("https://proxy-b:8443/ignored", "status", "proxy", "httpAddress", "url")(b)
	with(certificate("CA of b"), "status", "proxy", "httpAddress", "CACerts")(b)
	n.api.put(a, b, connector("default", "a1", "a"), connector("team-a", "b1", "b"))
	v := n.volume(attrs{"connector.name": "-", "connectors": "a1,team-a/b1", "configuration.names": ""})
	v.mustPublish()
	proxy := "https://default%2Fa1,team-a%2Fb1:" + v.pod.token + "@proxy-b:8443"
	v.want("http.proxy", proxy)
	v.want("connector.status.proxyAddress", "https://proxy-b:8443/ignored")
	v.want("ca.crt", certificate("CA of b"))
	v.wantEnvironment(proxy)
	if u, err := url.Parse(v.file("https.proxy")); err != nil || u.User.Username() != "default/a1,team-a/b1" {
		t.Error(u, err)
	}
}

func TestBuiltInFilesWithoutValues(t *testing.T) {
	t.Parallel()
	n := startNode(t, builtInFiles)
	n.api.put(connector("default", "git", "git", with(nil, "status")))
	v := n.volume(attrs{"configuration.names": "-"})
	v.mustPublish()
	v.wantFiles("context.token")
	for address, want := range sorted(map[string]string{
		"http://[fd00::1]:3128": "@[fd00::1]:3128", "https://proxy": "@proxy:443", "http://10.0.0.1/path?x": "@10.0.0.1:80",
		"http://proxy:": "@proxy:80",
	}) {
		n.api.put(connector("default", "git", "git", with(address, "status", "proxy", "httpAddress", "url")))
		v := n.volume(attrs{"configuration.names": "-"})
		v.mustPublish()
		if got := v.file("http.proxy"); !strings.HasSuffix(got, want) {
			t.Errorf("%s: %s", address, got)
		}
	}
	for _, address := range []string{"proxy:80", "ftp://proxy", "http://", "http:///path", "http://a(id)", "http://a;id",
		"http://%41", "//proxy"} {
		n.api.put(connector("default", "git", "git", with(address, "status", "proxy", "httpAddress", "url")))
		n.volume(attrs{"configuration.names": "-"}).mustRefuse(codes.FailedPrecondition, "is not an http or https URL")
	}
}

func TestCA(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	ofConnector, ofClass := with(certificate("CA of the Connector"), "status", "proxy", "httpAddress", "CACerts"),
		with(certificate("CA of the class"), "status", "proxy", "httpAddress", "CACerts")
	plain, withCA := gitClassOf("ca", "{{ .context.proxy.caCert }}"), gitClassOf("ca", "{{ .context.proxy.caCert }}")
	ofClass(withCA)
	for _, c := range []struct {
		class, connector object
		want             string
	}{
		{plain, connector("default", "git", "git"), ""},
		{plain, connector("default", "git", "git", ofConnector), certificate("CA of the Connector")},
		{withCA, connector("default", "git", "git"), certificate("CA of the class")},
		{withCA, connector("default", "git", "git", ofConnector), certificate("CA of the Connector")},
	} {
		n.api.put(c.class, c.connector)
		v := n.volume()
		v.mustPublish()
		v.want("ca", c.want)
	}
	n.api.put(connector("default", "last", "git",
		with(certificate("CA of the last"), "status", "proxy", "httpAddress", "CACerts")),
		connector("default", "none", "git"))
	v := n.volume(attrs{"connector.name": "-", "connectors": "git,last,none"})
	v.mustPublish()
	v.want("ca", certificate("CA of the last"))
}

// Classes print addresses as they are; whoever writes a Connector shall not add lines to other people's configuration.
func TestInjection(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	address := func(value string) func(object) { return with(value, "spec", "address") }
	extension := func(value string) func(object) {
		return with([]any{object{"name": "a", "value": 1}, object{"name": "b", "value": value}}, "spec", "addressExtensions")
	}
	url := func(value string) func(object) { return with(value, "status", "proxy", "httpAddress", "url") }
	proxyAddress := func(value string) func(object) { return with(value, "status", "proxyAddress") }
	for _, field := range []struct {
		name string
		of   func(value string) func(object)
	}{{"spec.address", address}, {"spec.addressExtensions", extension}, {"status.proxy.httpAddress.url", url},
		{"status.proxyAddress", proxyAddress}} {
		for _, value := range []string{"https://x\n[core]\n\tfsmonitor = id", "https://x\r", "https://x y", "\thttps://x",
			`https://x"`, "https://x'", `https://x\y`, "https://x`id`",
			"https://x\x00", "https://x\u0085", "https://x\u2028y", "https://x\u00a0", "https://x\x1b[31m"} {
			n.api.put(connector("default", "git", "git", field.of(value)))
			n.volume(attrs{"configuration.names": "first"}).mustRefuse(codes.FailedPrecondition,
				`Connector "default/git": `+field.name, "an address is ASCII")
		}
		n.api.put(connector("default", "git", "git", field.of("https://user@[fd00::1]:8443/path;x/?a=b&c=%20#d,~!*()")))
		n.volume(attrs{"configuration.names": "first"}).mustPublish()
	}
	for _, path := range [][]string{{"status", "proxyAddress"}, {"status", "proxy", "httpAddress", "url"}} {
		git := gitClass()
		with("https://x\n", path...)(git)
		n.api.put(git, connector("default", "git", "git"))
		n.volume().mustRefuse(codes.FailedPrecondition, `ConnectorClass "git": `+strings.Join(path, "."))
	}
}

func TestProxyAddress(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(gitClassOf("file", "{{ .connector.status.proxyAddress }} {{ .connector.status.proxy.httpAddress.url }}"),
		connector("default", "git", "git", with("http://as-it-is", "status", "proxyAddress")))
	v := n.volume()
	v.mustPublish()
	v.want("file", "http://as-it-is http://c-git.default.svc.cluster.local")
}
