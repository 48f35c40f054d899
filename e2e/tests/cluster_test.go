// Package tests has the tests that need a node.
package tests

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/machine"
	"connectors-csi/e2e/node"
)

// The words in which the tests speak about the cluster.

// limit is how long a test waits for anything. It is never reached when all is well, so it is generous.
const limit = 3 * time.Minute

// theNode is the one that all tests run on.
var theNode *node.Node

func TestMain(m *testing.M) {
	if !machine.Exists("go.mod") { // paths are relative to the module's directory, and go test starts in the package's
		if err := os.Chdir(".."); err != nil {
			panic(err)
		}
	}
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	flag.Parse()
	wait := func() error { return nil }
	if node.Outside() {
		_, glabErr := glab()
		if err := errors.Join(machine.Install(clientNeeds()), glabErr, cluster.BuildOldDriver()); err != nil {
			fail(err)
		}
		if isWholeRun() {
			var err error
			if wait, err = startSecondNode(); err != nil {
				fail(err)
			}
		}
	}
	flag.Lookup("test.parallel").Value.Set("100") // beside decides how many; as a flag that is given, Ginkgo refuses it
	code := node.On(func(n *node.Node) int {
		theNode = n
		return m.Run()
	})
	if err := wait(); err != nil {
		fail(fmt.Errorf("the tests on the second node: %w", err))
	}
	os.Exit(code)
}

// begin gives a test what it starts from: the driver as deploy.yaml has it, but for further arguments where
// the test needs them, and a namespace of its own. No test relies on what another has left.
func begin(t *testing.T, driverArgs ...string) namespace {
	t.Helper()
	unmeasured(t)
	installDriver(t, driverArgs...)
	return newNamespace(t)
}

// installDriver applies deploy.yaml, with further arguments for the driver, and waits until it is ready. It
// returns what kubectl apply said. Where everything is so already, it takes half a second.
func installDriver(t *testing.T, args ...string) string {
	t.Helper()
	applied := applyDriver(t, args...)
	awaitDriver(t)
	return applied
}

func applyDriver(t *testing.T, args ...string) string {
	t.Helper()
	return applyManifest(t, readFile(t, "../deploy.yaml"), args...)
}

func applyManifest(t *testing.T, content string, args ...string) string {
	t.Helper()
	manifest, err := cluster.WithArgs(content, args...)
	if err != nil {
		t.Fatal(err)
	}
	applied, err := cluster.KubectlStdin(manifest, "apply", cluster.Validation(), "-f", "-")
	if err != nil {
		t.Fatal(err)
	}
	return applied
}

// driverNamespace is the one that deploy.yaml creates.
func driverNamespace(t *testing.T) namespace { return namespace{t, "connectors-system"} }

const driverPods = "--selector=app.kubernetes.io/name=connectors-csi"

// driverPod returns a field of the driver's only Pod.
func driverPod(t *testing.T, field string) string {
	t.Helper()
	return driverNamespace(t).kubectl("get", "pod", driverPods, "--output=jsonpath={.items[0]"+field+"}")
}

// sorted goes over a table in the order of its keys, so that a test is the same each time.
func sorted[K cmp.Ordered, V any](table map[K]V) iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		for _, key := range slices.Sorted(maps.Keys(table)) {
			if !yield(key, table[key]) {
				return
			}
		}
	}
}

// awaitDriver waits until the driver's DaemonSet is rolled out.
func awaitDriver(t *testing.T) {
	t.Helper()
	driverNamespace(t).kubectl("rollout", "status", "daemonset/connectors-csi", "--timeout=2m")
}

// stopDriver makes the node one that the driver's DaemonSet is not for, and waits until the driver has ended.
// installDriver takes it back.
func stopDriver(t *testing.T) {
	t.Helper()
	driver := driverNamespace(t)
	driver.kubectl("patch", "daemonset", "connectors-csi",
		"--patch", `{"spec": {"template": {"spec": {"nodeSelector": {"kubernetes.io/os": "none"}}}}}`)
	driver.kubectl("wait", "--for=delete", "pod", driverPods, "--timeout=2m")
}

// driverURL is where the driver serves its health and its metrics.
func driverURL(t *testing.T) string {
	t.Helper()
	return "http://" + driverPod(t, ".status.podIP") + ":9808"
}

// saveState writes what there is to know about the cluster after a failure, and the driver's log, beside the
// logs of the components.
func saveState(t *testing.T) {
	path := theNode.Path(strings.ReplaceAll(t.Name(), "/", "-") + ".txt")
	if machine.Exists(path) {
		return
	}
	var state bytes.Buffer
	for _, args := range [][]string{
		{"get", "pods", "--all-namespaces", "--output=wide"},
		{"get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"},
		{"--namespace=connectors-system", "logs", driverPods, "--tail=-1"},
		{"--namespace=connectors-system", "logs", driverPods, "--tail=-1", "--previous"}, // there is one if it was restarted
		{"get", "connectorclasses,connectors", "--all-namespaces", "--output=yaml"},
	} {
		output, err := cluster.Kubectl(args...)
		fmt.Fprintf(&state, "$ kubectl %s\n%s\n", strings.Join(args, " "), output)
		if err != nil {
			fmt.Fprintln(&state, err)
		}
	}
	if err := os.WriteFile(path, state.Bytes(), 0o644); err != nil {
		t.Error(err)
	}
	t.Logf("Pods, events and the driver's log are in %s", path)
}

// namespace is one of the cluster's namespaces, made for a test. Its methods end the test if they fail.
type namespace struct {
	*testing.T
	name string
}

// newNamespace creates a namespace. After the test it goes in the background.
func newNamespace(t *testing.T) namespace {
	t.Helper()
	const manifest = "{apiVersion: v1, kind: Namespace, metadata: {generateName: test-}}"
	created, err := cluster.KubectlStdin(manifest, "create", "-f", "-", "--output=jsonpath={.metadata.name}")
	if err != nil {
		t.Fatal(err)
	}
	ns := namespace{t, created}
	t.Cleanup(func() {
		if t.Failed() {
			saveState(t)
		}
		ns.kubectl("delete", "namespace", ns.name, "--wait=false")
	})
	ns.kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	return ns
}

// kubectl runs kubectl in the namespace and returns what it printed.
func (ns namespace) kubectl(args ...string) string {
	ns.Helper()
	output, err := cluster.Kubectl(append([]string{"--namespace", ns.name}, args...)...)
	if err != nil {
		ns.Fatal(err)
	}
	return output
}

// apply applies manifests.
func (ns namespace) apply(manifest string) {
	ns.Helper()
	if _, err := cluster.KubectlStdin(manifest, "--namespace", ns.name, "apply", "-f", "-"); err != nil {
		ns.Fatalf("%v\n%s", err, manifest)
	}
}

// configurations are those of a ConnectorClass: templates by file name by configuration.
type configurations map[string]map[string]string

// class creates a ConnectorClass. Classes belong to no namespace, so every test names its own.
func (ns namespace) class(name string, of configurations) {
	ns.Helper()
	var list []any
	for configuration, data := range of {
		list = append(list, map[string]any{"name": configuration, "data": data})
	}
	manifest, err := json.Marshal(map[string]any{
		"apiVersion": "connectors.alauda.io/v1alpha1", "kind": "ConnectorClass",
		"metadata": map[string]any{"name": name},
		"spec":     map[string]any{"configurations": list},
	})
	if err != nil {
		ns.Fatal(err)
	}
	ns.apply(string(manifest))
}

// connector creates a Connector.
func (ns namespace) connector(name, class, address string) {
	ns.Helper()
	ns.apply(fmt.Sprintf(`
apiVersion: connectors.alauda.io/v1alpha1
kind: Connector
metadata: {name: %s}
spec: {connectorClassName: %s, address: %q}
`, name, class, address))
}

// proxy sets the proxy's address in the status of a Connector or of a ConnectorClass, as the operator does.
func (ns namespace) proxy(kind, name, url string) {
	ns.Helper()
	ns.kubectl("patch", kind, name, "--subresource=status", "--type=merge",
		"--patch", fmt.Sprintf(`{"status": {"proxy": {"httpAddress": {"url": %q}}}}`, url))
}

// allow lets the ServiceAccount of another namespace, or of this one, read the Connectors in this one.
func (ns namespace) allow(serviceAccount string, of namespace) {
	ns.Helper()
	ns.kubectl("create", "rolebinding", of.name+"-"+serviceAccount,
		"--clusterrole=connectors-connector-viewer-role", "--serviceaccount="+of.name+":"+serviceAccount)
}

// target creates all that a Pod with the attributes of mountTarget needs: a class with one configuration, a
// Connector, and the permission to read it for the default ServiceAccount.
func (ns namespace) target(class string, files map[string]string) {
	ns.Helper()
	ns.class(class, configurations{"config": files})
	ns.connector("target", class, "https://one.example.com")
	ns.allow("default", ns)
}

const mountTarget = `{connector.name: target, configuration.names: config}`

// pod creates a Pod that does nothing and has a volume with these attributes on /volume. Further lines are
// fields of its spec.
func (ns namespace) pod(name, attributes string, fields ...string) {
	ns.Helper()
	ns.apply(cluster.PodManifest(name, attributes, fields...))
}

// running waits until Pods are.
func (ns namespace) running(pods ...string) {
	ns.Helper()
	for _, pod := range pods {
		ns.kubectl("wait", "--for=condition=Ready", "pod/"+pod, "--timeout=2m")
	}
}

// deploy runs Pods like that of cluster.PodManifest, as a Deployment, and returns how long it took until all were
// ready.
func (ns namespace) deploy(name string, pods int, attributes string) time.Duration {
	ns.Helper()
	_, spec, _ := strings.Cut(cluster.PodManifest(name, attributes), "\nspec:\n")
	began := time.Now()
	ns.apply(fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: %s}
spec:
  replicas: %d
  selector: {matchLabels: {app: %s}}
  template:
    metadata: {labels: {app: %s}}
    spec:
    %s
`, name, pods, name, name, strings.ReplaceAll(spec, "\n", "\n    ")))
	ns.kubectl("wait", fmt.Sprintf("--for=jsonpath={.status.readyReplicas}=%d", pods), "deployment/"+name, "--timeout=5m")
	return time.Since(began)
}

// deleteDeployment deletes a Deployment, which has all of the namespace's Pods, and waits until nothing is left of
// them.
func (ns namespace) deleteDeployment(name string) {
	ns.Helper()
	uids := ns.uids()
	ns.kubectl("delete", "deployment", name, "--cascade=foreground", "--timeout=5m")
	for _, uid := range uids {
		ns.gone(uid)
	}
}

// uids returns those of the namespace's Pods.
func (ns namespace) uids() []string {
	ns.Helper()
	return strings.Fields(ns.kubectl("get", "pods", "--output=jsonpath={.items[*].metadata.uid}"))
}

// deletePod deletes a Pod and waits until the API server has forgotten it.
func (ns namespace) deletePod(name string) {
	ns.Helper()
	ns.kubectl("delete", "pod", name, "--timeout=2m")
}

// refused waits for the event that the Pod's volume could not be mounted for the reasons given, checks that
// it is not mounted, and returns the event's message.
func (ns namespace) refused(pod string, reasons ...string) (message string) {
	ns.Helper()
	message = ns.failedMount(pod, reasons...)
	if phase := ns.kubectl("get", "pod", pod, "--output=jsonpath={.status.phase}"); phase != "Pending" {
		ns.Errorf("Pod %s is %s, although its volume was refused", pod, phase)
	}
	if lines := cluster.Mounts(ns.uid(pod)); len(lines) > 0 {
		ns.Errorf("the volume of Pod %s was refused and is mounted: %s", pod, lines)
	}
	return message
}

// failedMount waits for an event of the Pod in which kubelet gives these reasons, and returns its message.
func (ns namespace) failedMount(pod string, reasons ...string) (message string) {
	ns.Helper()
	ns.eventually(func() error {
		messages := ns.kubectl("get", "events", "--field-selector=reason=FailedMount,involvedObject.name="+pod,
			"--output", `jsonpath={range .items[*]}{.message}{"\n"}{end}`)
		for message = range strings.Lines(messages) {
			if containsAll(message, reasons) {
				return nil
			}
		}
		return fmt.Errorf("no FailedMount event of Pod %s says %q; there are:\n%s", pod, reasons, messages)
	})
	return message
}

// answered returns nil if a request was denied for a reason, or granted where there is none.
func answered(err error, reason string) error {
	switch {
	case reason == "":
		return err
	case err == nil || !strings.Contains(err.Error(), reason):
		return fmt.Errorf("%v; %q is expected", err, reason)
	}
	return nil
}

// wantDenied waits until a request is denied for a reason: the API server looks once a second whether policies have
// changed.
func (ns namespace) wantDenied(reason string, request func() error) {
	ns.Helper()
	ns.eventually(func() error { return answered(request(), reason) })
}

func containsAll(text string, parts []string) bool {
	for _, part := range parts {
		if !strings.Contains(text, part) {
			return false
		}
	}
	return true
}

// eventually waits for a condition.
func (ns namespace) eventually(condition func() error) {
	ns.Helper()
	if err := cluster.Await(limit, condition); err != nil {
		ns.Fatal(err)
	}
}

// sh runs a shell script in a Pod's container and returns what it printed, also when it fails.
func (ns namespace) sh(pod, script string) (string, error) {
	output, err := exec.Command("kubectl", "--namespace", ns.name, "exec", pod, "--", "sh", "-c", script).CombinedOutput()
	return strings.TrimSpace(string(output)), err
}

// read returns a file as the Pod's container sees it.
func (ns namespace) read(pod, file string) string {
	ns.Helper()
	return ns.kubectl("exec", pod, "--", "cat", file)
}

// want checks a file as the Pod's container sees it.
func (ns namespace) want(pod, file, content string) {
	ns.Helper()
	if err := ns.has(pod, file, content); err != nil {
		ns.Error(err)
	}
}

// has compares a file as the Pod's container sees it.
func (ns namespace) has(pod, file, content string) error {
	got, err := cluster.Kubectl("--namespace", ns.name, "exec", pod, "--", "cat", file)
	if err == nil && got != content {
		err = fmt.Errorf("%s in Pod %s is %q, not %q", file, pod, got, content)
	}
	return err
}

// wantFiles checks the names of a volume's files as the Pod's container sees them, hidden ones too, but not
// those of the volume's own layout.
func (ns namespace) wantFiles(pod, dir string, names ...string) {
	ns.Helper()
	listed := strings.Fields(ns.kubectl("exec", pod, "--", "ls", "-A", dir))
	listed = slices.DeleteFunc(listed, func(name string) bool { return strings.HasPrefix(name, "..") })
	if !slices.Equal(listed, names) {
		ns.Errorf("the files in Pod %s are %q, not %q", pod, listed, names)
	}
}

// moveTo gives the Connector "target" another address and waits until the Pod's container sees it.
func (ns namespace) moveTo(address, pod, file string) {
	ns.Helper()
	ns.kubectl("patch", "connector", "target", "--type=merge", "--patch",
		fmt.Sprintf(`{"spec": {"address": %q}}`, address))
	ns.eventually(func() error { return ns.has(pod, file, address) })
}

// uid returns a Pod's uid.
func (ns namespace) uid(pod string) string {
	ns.Helper()
	return ns.kubectl("get", "pod", pod, "--output=jsonpath={.metadata.uid}")
}

// wantOneMount checks that the Pod's only volume is mounted once, read-only on the node too, and returns the
// mount's ID.
func (ns namespace) wantOneMount(uid string) string {
	ns.Helper()
	lines := cluster.Mounts(uid)
	if len(lines) != 1 {
		ns.Fatalf("exactly one mount is expected for the volume, there are %d: %q", len(lines), lines)
	}
	fields := strings.Fields(lines[0])
	if options := strings.Split(fields[5], ","); !slices.Contains(options, "ro") {
		ns.Errorf("the volume is mounted with options %q, not read-only", options)
	}
	return fields[0]
}

// wantSameMount checks that the Pod's only volume is still mounted as wantOneMount found it.
func (ns namespace) wantSameMount(uid, mount string) {
	ns.Helper()
	if after := ns.wantOneMount(uid); after != mount {
		ns.Errorf("the volume was mounted anew: mount %s became mount %s", mount, after)
	}
}

// gone waits until nothing is left of a deleted Pod on the node: no mount, no directory.
func (ns namespace) gone(uid string) {
	ns.Helper()
	ns.eventually(func() error {
		if lines := cluster.MountsBelow(cluster.KubeletPods + uid + "/"); len(lines) > 0 {
			return fmt.Errorf("of the deleted Pod %s are left: %s", uid, lines)
		}
		if machine.Exists(cluster.KubeletPods + uid) {
			return fmt.Errorf("of the deleted Pod is left: %s", cluster.KubeletPods+uid)
		}
		return nil
	})
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// filesBelow returns the contents of all regular files in a directory tree, hidden ones too.
func filesBelow(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		found[path] = string(content)
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // a refresh may remove files meanwhile
		t.Fatal(err)
	}
	return found
}

// restartKubelet kills kubelet, starts it again and waits until it serves.
func restartKubelet(ns namespace) {
	ns.Helper()
	theNode.Kubelet.Stop()
	theNode.Kubelet = theNode.Restart(theNode.Kubelet)
	ns.eventually(func() error {
		_, err := cluster.Kubectl("get", "--raw", "/api/v1/nodes/"+node.Name+"/proxy/healthz")
		return err
	})
}

// restartAPIServer restarts the API server with further flags, until the test ends.
func restartAPIServer(ns namespace, flags ...string) {
	ns.Helper()
	ready := func() error { _, err := cluster.Kubectl("get", "--raw", "/readyz"); return err }
	before := theNode.APIServer
	ns.Cleanup(func() {
		theNode.APIServer.Stop()
		theNode.APIServer = theNode.Restart(before)
		ns.eventually(ready)
	})
	theNode.APIServer.Stop()
	theNode.APIServer = theNode.Run(filepath.Base(before.Cmd.Path), append(slices.Clone(before.Cmd.Args[1:]), flags...)...)
	ns.eventually(ready)
}

// freshDriver replaces the driver's Pod by a new one, whose log and cgroup begin anew.
func freshDriver(t *testing.T) {
	t.Helper()
	driverNamespace(t).kubectl("delete", "pod", driverPods, "--timeout=2m")
	awaitDriver(t)
}

// wantNoRestart checks that the driver's container is the first of its Pod.
func wantNoRestart(t *testing.T) {
	t.Helper()
	if restarts := driverPod(t, ".status.containerStatuses[0].restartCount"); restarts != "0" {
		t.Errorf("the driver was restarted %s times", restarts)
	}
}

// driverMemory returns the most memory that the driver's container has had, and its limit, in bytes.
func driverMemory(t *testing.T) (peak, most int64) {
	t.Helper()
	return driverCgroup(t, "memory/memory.max_usage_in_bytes", "memory.peak"),
		driverCgroup(t, "memory/memory.limit_in_bytes", "memory.max")
}

// driverProcessorTime returns the processor time that the processes of the driver's container have used.
func driverProcessorTime(t *testing.T) time.Duration {
	t.Helper()
	if v2, _ := node.IsCgroup2(); v2 {
		return time.Duration(driverCgroup(t, "", "cpu.stat")) * time.Microsecond
	}
	return time.Duration(driverCgroup(t, "cpuacct/cpuacct.usage", ""))
}

// driverContainer is the ID of the driver's container.
func driverContainer(t *testing.T) string {
	t.Helper()
	return strings.TrimPrefix(driverPod(t, ".status.containerStatuses[0].containerID"), "containerd://")
}

// driverCgroup is CgroupValue of the driver's container.
func driverCgroup(t *testing.T, v1, v2 string) (value int64) {
	t.Helper()
	value, err := theNode.CgroupValue(driverContainer(t), v1, v2)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// metric returns the sum of the driver's metrics whose name and labels match a pattern.
func metric(t *testing.T, pattern string) (sum float64) {
	t.Helper()
	page, err := cluster.HTTPGet(driverURL(t) + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`(?m)^`+pattern+` (.*)$`).FindAllStringSubmatch(page, -1)
	if found == nil {
		t.Fatalf("the driver has no metric %s:\n%s", pattern, page)
	}
	for _, match := range found {
		value, err := strconv.ParseFloat(match[len(match)-1], 64)
		if err != nil {
			t.Fatal(err)
		}
		sum += value
	}
	return sum
}

// publish is what a line of the driver's log says of a NodePublishVolume that failed or changed something.
type publish struct {
	namespace string
	took      time.Duration
	code, err string // empty where it succeeded
}

var publishLine = regexp.MustCompile(`msg=publish pod=([^ /]+)/\S+ .*?duration=(\S+)(?: code=(\S+) error=(.*))?\n`)

// publishes returns those that the driver has logged since its start.
func publishes(t *testing.T) (all []publish) {
	t.Helper()
	log := driverNamespace(t).kubectl("logs", driverPods, "--tail=-1")
	for _, line := range publishLine.FindAllStringSubmatch(log, -1) {
		took, err := time.ParseDuration(line[2])
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, publish{line[1], took, line[3], line[4]})
	}
	return all
}

// percentile99 returns the time within which 99 of 100 of these publishes ended.
func percentile99(of []publish) time.Duration {
	if len(of) == 0 {
		return 0
	}
	sorted := slices.SortedFunc(slices.Values(of), func(a, b publish) int { return cmp.Compare(a.took, b.took) })
	return sorted[(len(sorted)*99+99)/100-1].took
}

func (ns namespace) claims(token string) cluster.Claims {
	ns.Helper()
	c, err := cluster.ParseClaims(token)
	if err != nil {
		ns.Fatal(err)
	}
	return c
}
