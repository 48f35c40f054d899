package tests

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/image"
	"connectors-csi/e2e/node"
)

// What Pods see while the driver, kubelet or the API server is away, or a refresh fails.

// watcher creates a Pod that reads /volume/address over and over, and says so when it is not an address.
func (ns namespace) watcher(name string) {
	ns.Helper()
	manifest := cluster.PodManifest(name, mountTarget)
	ns.apply(strings.Replace(manifest, "[sleep, infinity]", `
    - sh
    - -c
    - |
      reads=0
      while usleep 20000; do
        case "$(cat /volume/address 2>&1)" in
        https://*.example.com) reads=$((reads+1)); echo $reads > /tmp/reads;;
        *) echo "after $reads reads: $(cat /volume/address 2>&1; ls -la /volume 2>&1)";;
        esac
      done`, 1))
	ns.running(name)
}

// wantNoMiss checks that a watcher has always seen the file, and that it has looked.
func (ns namespace) wantNoMiss(name string) {
	ns.Helper()
	ns.eventually(func() error {
		if reads, err := strconv.Atoi(strings.TrimSpace(ns.read(name, "/tmp/reads"))); err != nil || reads < 100 {
			return fmt.Errorf("Pod %s has read its file %d times only (%v)", name, reads, err)
		}
		return nil
	})
	if misses := ns.kubectl("logs", name); misses != "" {
		ns.Errorf("Pod %s did not always see its file:\n%s", name, misses)
	}
}

func TestFailedRefreshKeepsFiles(t *testing.T) {
	ns := beside(t, quickRefresh)
	ns.target("refresh", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.watcher("pod")
	mount := ns.wantOneMount(ns.uid("pod"))

	// Neither a broken class nor a withdrawn permission takes anything from a running Pod; its events tell.
	ns.class("refresh", configurations{"config": {"address": "{{ .connector.spec.nothing }}"}})
	ns.failedMount("pod", "{{ .connector.spec.nothing }} has no value")
	ns.want("pod", "/volume/address", "https://one.example.com")
	ns.class("refresh", configurations{"config": {"address": "{{ .connector.spec.address }}"}})
	ns.kubectl("delete", "rolebinding", "--all")
	ns.kubectl("patch", "connector", "target", "--type=merge", "--patch",
		`{"spec": {"address": "https://kept-away.example.com"}}`)
	ns.failedMount("pod", "may not read Connector")
	ns.want("pod", "/volume/address", "https://one.example.com")

	ns.allow("default", ns)
	ns.moveTo("https://two.example.com", "pod", "/volume/address")
	ns.wantNoMiss("pod")
	ns.wantSameMount(ns.uid("pod"), mount)
}

func TestPodsKeepFilesWhenTheDriverIsReplaced(t *testing.T) {
	ns := begin(t, quickRefresh)
	ns.target("kept", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.watcher("pod")
	mount := ns.wantOneMount(ns.uid("pod"))

	driverNamespace(t).kubectl("delete", "pod", driverPods, "--timeout=2m")
	awaitDriver(t)
	ns.moveTo("https://two.example.com", "pod", "/volume/address")

	driverNamespace(t).kubectl("set", "image", "daemonset/connectors-csi", "csi-driver="+image.Upgrade)
	awaitDriver(t)
	if used := driverPod(t, ".spec.containers[0].image"); used != image.Upgrade {
		t.Errorf("the driver was not upgraded, its image is %s", used)
	}
	ns.moveTo("https://three.example.com", "pod", "/volume/address")
	ns.moveTo("https://four.example.com", "pod", "/volume/address")

	ns.wantNoMiss("pod")
	ns.wantSameMount(ns.uid("pod"), mount)
}

func TestPodsKeepFilesWhenKubeletIsKilled(t *testing.T) {
	ns := begin(t, quickRefresh)
	ns.target("kubelet", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.watcher("pod")
	uid := ns.uid("pod")
	mount := ns.wantOneMount(uid)

	restartKubelet(ns)
	ns.moveTo("https://two.example.com", "pod", "/volume/address")

	ns.wantNoMiss("pod")
	ns.wantSameMount(uid, mount)
	ns.deletePod("pod")
	ns.gone(uid)
}

func TestPodsKeepFilesWhileTheAPIServerIsDown(t *testing.T) {
	ns := begin(t, quickRefresh)
	ns.target("api-server", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.watcher("pod")
	uid, driver := ns.uid("pod"), driverURL(t)

	theNode.APIServer.Stop()
	refreshed := cluster.Await(limit, func() error { // kubelet goes on calling the driver, which can read nothing
		metrics, err := cluster.HTTPGet(driver + "/metrics")
		if err == nil && !strings.Contains(metrics, `connectors_csi_publish_total{code="Unavailable"}`) {
			err = fmt.Errorf("no publish has failed:\n%s", metrics)
		}
		return err
	})
	address, err := os.ReadFile(cluster.VolumeDir(uid, "volume") + "/address")
	theNode.APIServer = theNode.Restart(theNode.APIServer) // before anything can end the test: the others need it
	ns.eventually(func() error {
		_, err := cluster.Kubectl("get", "--raw", "/readyz")
		return err
	})
	if refreshed != nil {
		t.Error(refreshed)
	}
	if string(address) != "https://one.example.com" {
		t.Errorf("without an API server the address is %q (%v)", address, err)
	}

	ns.moveTo("https://two.example.com", "pod", "/volume/address")
	ns.wantNoMiss("pod")
	ns.wantOneMount(uid)
}

func TestDeletedPodsLeaveNothing(t *testing.T) {
	ns := begin(t)
	ns.target("deleted", map[string]string{"address": "{{ .connector.spec.address }}"})
	uids := map[string]string{}
	for _, pod := range []string{"deleted", "deleted-without-driver", "forgotten-without-driver"} {
		ns.pod(pod, mountTarget)
		ns.running(pod)
		uids[pod] = ns.uid(pod)
		ns.wantOneMount(uids[pod])
	}

	ns.deletePod("deleted")
	ns.gone(uids["deleted"])

	// While no driver runs, volumes stay mounted; the next driver unmounts them.
	stopDriver(t)
	ns.kubectl("delete", "pod", "deleted-without-driver", "--wait=false")
	ns.kubectl("delete", "pod", "forgotten-without-driver", "--force")
	without := []string{uids["deleted-without-driver"], uids["forgotten-without-driver"]}
	for _, uid := range without {
		ns.eventually(func() error { return kubeletFailedToUnmount(t, uid) })
		ns.wantOneMount(uid)
	}
	installDriver(t)
	for _, uid := range without {
		ns.gone(uid)
	}
	ns.kubectl("wait", "--for=delete", "pod", "--all", "--timeout=2m")
}

// kubeletFailedToUnmount looks in kubelet's log for a Pod's volume that could not be unmounted.
func kubeletFailedToUnmount(t *testing.T, uid string) error {
	for line := range strings.Lines(readFile(t, theNode.Kubelet.Log)) {
		if strings.Contains(line, uid) && strings.Contains(line, "UnmountVolume.TearDown failed") {
			return nil
		}
	}
	return fmt.Errorf("kubelet has not tried to unmount the volume of Pod %s", uid)
}

func TestDriverIsListedOnlyWhileItServes(t *testing.T) {
	ns := begin(t)
	listed := func() string {
		return ns.kubectl("get", "csinode", node.Name, "--output=jsonpath={.spec.drivers[*].name}")
	}
	if drivers := listed(); drivers != "connectors-csi" {
		t.Errorf("the driver is ready, and CSINode lists %q", drivers)
	}
	for path, content := range sorted(map[string]string{
		"/healthz": "ok\n", "/readyz": "ok\n", "/metrics": "\nconnectors_csi_volumes ",
	}) {
		if page, err := cluster.HTTPGet(driverURL(t) + path); err != nil || !strings.Contains(page, content) {
			t.Errorf("%s: %v\n%s", path, err, page)
		}
	}

	stopDriver(t)
	ns.eventually(func() error {
		if drivers := listed(); drivers != "" {
			return fmt.Errorf("the driver has ended, and CSINode lists %q", drivers)
		}
		return nil
	})
	ns.target("listed", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.pod("pod", mountTarget)
	ns.refused("pod", "driver name connectors-csi not found in the list of registered CSI drivers")

	// One that does not get as far as serving isn't listed.
	applyDriver(t, "--refresh-interval=0s")
	ns.eventually(func() error {
		restarts := driverNamespace(t).kubectl("get", "pod", driverPods,
			"--output=jsonpath={.items[*].status.containerStatuses[0].restartCount}")
		if restarts == "" || restarts == "0" {
			return errors.New("the driver has not ended")
		}
		return nil
	})
	if drivers := listed(); drivers != "" {
		t.Errorf("the driver does not start, and CSINode lists %q", drivers)
	}

	installDriver(t)
	if drivers := listed(); drivers != "connectors-csi" {
		t.Errorf("the driver is ready again, and CSINode lists %q", drivers)
	}
	ns.running("pod")
}
