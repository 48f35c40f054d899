package tests

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectors-csi/e2e/cluster"
)

// Changes of objects, and many Pods at once.

func TestChangesReachRunningPodsWhichCannotWrite(t *testing.T) {
	ns := beside(t)
	ns.target("changes", map[string]string{"address": "{{ .connector.spec.address }}", "text": "first"})
	ns.pod("pod", mountTarget)
	ns.running("pod")
	ns.want("pod", "/volume/text", "first")

	ns.kubectl("patch", "connectorclass", "changes", "--type=merge", "--patch",
		`{"spec": {"configurations": [{"name": "config", "data": {"address": "{{ .connector.spec.address }}", "text": "second", "new": "file"}}]}}`)
	ns.moveTo("https://two.example.com", "pod", "/volume/address")
	ns.eventually(func() error { return ns.has("pod", "/volume/text", "second") })
	ns.want("pod", "/volume/new", "file")

	for _, command := range []string{
		"echo mine > /volume/text", "echo mine > /volume/mine", "rm /volume/text", "chmod 600 /volume/..data/text",
		"rm -r /volume/..data/",
	} {
		if output, err := ns.sh("pod", command); err == nil || !strings.Contains(output, "Read-only file system") {
			t.Errorf("%q in the container: %v: %s", command, err, output)
		}
	}
	if output, err := ns.sh("pod", "mount -o remount,rw /volume"); err == nil {
		t.Errorf("the container could make its volume writable: %s", output)
	}
	if options, _ := ns.sh("pod", "grep ' /volume ' /proc/mounts"); !strings.Contains(options, " ro,") {
		t.Errorf("the container's mount is not read-only: %q", options)
	}
	ns.wantOneMount(ns.uid("pod"))
	ns.want("pod", "/volume/text", "second")
}

// Changes of a Connector, of its status and of its class, 50 of each, are in the files of two Pods of one
// ServiceAccount and of one of another long before kubelet's next call. The times include kubectl's own. Each kind has
// a namespace and a class of its own: a volume is pushed once a second, and meanwhile the others' turn comes, one at a
// time.
func TestChangesArriveWithoutKubelet(t *testing.T) {
	measured(t)
	const files = `{"address": "{{ .connector.spec.address }}", "status": "{{ index .connector.status \"proxyAddress\" }}", "class": "%d"}`
	kinds := []*struct {
		what, file, content string // the content has the change's number
		patch               func(i int) []string
		ns                  namespace
		dirs                []string
		last                time.Time
		took                []time.Duration
	}{
		{what: "Connector", file: "address", content: "https://host-%d", patch: func(i int) []string {
			return []string{"connector", "target", "--patch", fmt.Sprintf(`{"spec": {"address": "https://host-%d"}}`, i)}
		}},
		{what: "status", file: "status", content: "http://proxy-%d", patch: func(i int) []string {
			return []string{"connector", "target", "--subresource=status",
				"--patch", fmt.Sprintf(`{"status": {"proxyAddress": "http://proxy-%d"}}`, i)}
		}},
		{what: "class", file: "class", content: "%d", patch: func(i int) []string {
			return []string{"connectorclass", "pushed-class",
				"--patch", fmt.Sprintf(`{"spec": {"configurations": [{"name": "config", "data": `+files+`}]}}`, i)}
		}},
	}
	for _, k := range kinds {
		k.ns = newNamespace(t)
		var data map[string]string
		if err := json.Unmarshal(fmt.Appendf(nil, files, 0), &data); err != nil {
			t.Fatal(err)
		}
		k.ns.target("pushed-"+strings.ToLower(k.what), data)
		k.ns.kubectl("patch", "connector", "target", "--subresource=status", "--type=merge",
			"--patch", `{"status": {"proxyAddress": "http://proxy-0"}}`)
		k.ns.kubectl("create", "serviceaccount", "builder")
		k.ns.allow("builder", k.ns)
		k.ns.pod("one", mountTarget)
		k.ns.pod("two", mountTarget)
		k.ns.pod("builder", mountTarget, "serviceAccountName: builder")
	}
	for _, k := range kinds {
		k.ns.running("one", "two", "builder")
		for _, uid := range k.ns.uids() {
			k.dirs = append(k.dirs, cluster.VolumeDir(uid, "volume"))
		}
	}
	for i := 1; i <= 50; i++ {
		for _, k := range kinds {
			time.Sleep(time.Until(k.last.Add(1100 * time.Millisecond))) // the first change of a second is what is measured
			began := time.Now()
			k.ns.kubectl(append([]string{"patch", "--type=merge"}, k.patch(i)...)...)
			for _, dir := range k.dirs {
				awaitFile(t, filepath.Join(dir, k.file), fmt.Sprintf(k.content, i))
			}
			k.last = time.Now()
			k.took = append(k.took, k.last.Sub(began))
		}
	}
	for _, k := range kinds {
		slices.Sort(k.took)
		t.Logf("a change of the %s is in all three Pods after p50 %v, p99 %v", k.what,
			k.took[24].Round(time.Millisecond), k.took[49].Round(time.Millisecond))
		if k.took[24] > 10*time.Second {
			t.Errorf("%s: half of the changes took longer than %v: kubelet brought them", k.what, k.took[24])
		}
	}
}

// awaitFile waits until a file on the node has this content, and looks more often than await does.
func awaitFile(t *testing.T, path, want string) {
	t.Helper()
	for began := time.Now(); time.Since(began) < limit; time.Sleep(2 * time.Millisecond) {
		if content, err := os.ReadFile(path); err == nil && string(content) == want {
			return
		}
	}
	t.Fatalf("%s has never had the content %q", path, want)
}

func TestHundredPodsAtOnce(t *testing.T) {
	ns := measured(t)
	ns.target("load", map[string]string{"address": "{{ .connector.spec.address }}", "token": "{{ .context.token }}"})
	const pods = 100
	created := ns.deploy("load", pods, mountTarget)
	uids := ns.uids()
	if len(uids) != pods {
		t.Errorf("there are %d Pods, not %d", len(uids), pods)
	}
	for _, uid := range uids {
		ns.wantOneMount(uid)
		dir := cluster.VolumeDir(uid, "volume")
		if address := readFile(t, dir+"/address"); address != "https://one.example.com" {
			t.Errorf("Pod %s has the address %q", uid, address)
		}
		if bound := ns.claims(readFile(t, dir+"/token")).Kubernetes.Pod.UID; bound != uid {
			t.Errorf("Pod %s has the token of Pod %s", uid, bound)
		}
	}

	began := time.Now()
	ns.deleteDeployment("load")
	peak, most := driverMemory(t)
	t.Logf("%d Pods ran after %v and were gone after %v; the driver had at most %d MiB of memory, its limit is %d MiB",
		pods, created.Round(time.Second), time.Since(began).Round(time.Second), peak>>20, most>>20)
	if peak > most/2 { // there is to be room for ten times as many
		t.Errorf("with %d Pods the driver needed %d MiB, more than half of its limit", pods, peak>>20)
	}
	wantNoRestart(t)
}

// The tests below need to see several refreshes, so they shorten the interval of a minute.
const quickRefresh = "--refresh-interval=1s"
