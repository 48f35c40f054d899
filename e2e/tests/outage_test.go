package tests

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

// The API server is away for five minutes, in which the Connector changes in etcd: its return alone, without kubelet,
// brings the change to the file.
func TestChangesArriveAfterFiveMinutesWithoutTheAPIServer(t *testing.T) {
	const away, back = 5 * time.Minute, 35 * time.Second // a broken watch is opened again within 30 s
	release := processors(t, unix.LOCK_SH)
	installDriver(t)
	ns := newNamespace(t)
	ns.target("away", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.watcher("pod")
	uid := ns.uid("pod")
	mount, file := ns.wantOneMount(uid), cluster.VolumeDir(uid, "volume")+"/address"

	theNode.APIServer.Stop()
	changed := changeInEtcd("/registry/connectors.alauda.io/connectors/"+ns.name+"/target", "https://one.", "https://two.")
	release()
	time.Sleep(away) // what is tried, and what nothing but the driver's attempts is done in
	processors(t, unix.LOCK_EX)
	kept, err := os.ReadFile(file)
	theNode.Kubelet.Stop()
	theNode.APIServer = theNode.Restart(theNode.APIServer)
	ready := cluster.Await(limit, func() error {
		_, err := cluster.Kubectl("get", "--raw", "/readyz")
		return err
	})
	returned := time.Now()
	arrived := cluster.Await(limit, func() error {
		address, err := os.ReadFile(file)
		if err == nil && string(address) != "https://two.example.com" {
			err = fmt.Errorf("the address is %q", address)
		}
		return err
	})
	took := time.Since(returned)
	theNode.Kubelet = theNode.Restart(theNode.Kubelet) // before anything can end the test: the others need it
	if err := errors.Join(changed, err, ready, arrived); err != nil {
		t.Fatal(err)
	}
	if string(kept) != "https://one.example.com" {
		t.Errorf("without an API server the address is %q", kept)
	}
	t.Logf("the change is in the file %v after the API server's return", took.Round(100*time.Millisecond))
	if took > back {
		t.Errorf("that took longer than %v", back)
	}
	ns.eventually(func() error { return ns.has("pod", "/volume/address", "https://two.example.com") })
	ns.wantNoMiss("pod")
	ns.wantSameMount(uid, mount)
}

// changeInEtcd replaces a text in a custom resource, which the API server keeps as JSON.
func changeInEtcd(key, before, after string) error {
	var answer struct {
		KVs []struct{ Value []byte } `json:"kvs"`
	}
	if err := askEtcd("range", map[string][]byte{"key": []byte(key)}, &answer); err != nil {
		return err
	}
	if len(answer.KVs) != 1 || !bytes.Contains(answer.KVs[0].Value, []byte(before)) {
		return fmt.Errorf("etcd has no %s with %q", key, before)
	}
	value := bytes.ReplaceAll(answer.KVs[0].Value, []byte(before), []byte(after))
	return askEtcd("put", map[string][]byte{"key": []byte(key), "value": value}, nil)
}

// askEtcd sends a request to etcd's JSON gateway.
func askEtcd(method string, request, answer any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	response, err := http.Post("http://127.0.0.1:2379/v3/kv/"+method, "application/json", bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("etcd: %s: %s", method, response.Status)
	}
	if answer == nil {
		return nil
	}
	return json.NewDecoder(response.Body).Decode(answer)
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
