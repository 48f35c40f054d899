package tests

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"connectors-csi/e2e/cluster"
)

// What the driver's process may not: use the capabilities that it gives up. What the API server refuses is tried in
// policy_test.go.

func TestDriverKeepsFewCapabilities(t *testing.T) {
	ns := beside(t)
	ns.target("rights", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.pod("pod", mountTarget)
	ns.running("pod")
	driver, err := cluster.ContainerProcess(driverContainer(t))
	if err != nil {
		t.Fatal(err)
	}
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", driver))
	if err != nil || len(threads) == 0 {
		t.Fatalf("no thread of the driver: %v", err)
	}
	// CHOWN, DAC_OVERRIDE, KILL, SETGID, SETUID, SETPCAP, SYS_CHROOT, SYS_ADMIN
	const none, kept = "0000000000000000", "00000000002401e3"
	for _, thread := range threads {
		status := readFile(t, thread)
		for _, line := range []string{"CapInh:\t" + none, "CapPrm:\t" + kept, "CapEff:\t" + kept, "CapBnd:\t" + kept,
			"CapAmb:\t" + none, "NoNewPrivs:\t1"} {
			if !strings.Contains(status, "\n"+line+"\n") {
				t.Errorf("%s has no line %q:\n%s", thread, line, status)
			}
		}
	}
}

// What the API server lets the driver do, beyond what it lets every ServiceAccount of the namespace do, and what the
// driver's Pod has of the node.
func TestDriverHasNoOtherRights(t *testing.T) {
	ns := begin(t)
	rights := func(user, namespace string) (lines []string) {
		output := ns.kubectl("auth", "can-i", "--list", "--no-headers", "--namespace="+namespace,
			"--as=system:serviceaccount:connectors-system:"+user,
			"--as-group=system:serviceaccounts", "--as-group=system:serviceaccounts:connectors-system",
			"--as-group=system:authenticated")
		for line := range strings.Lines(output) {
			lines = append(lines, strings.Join(strings.Fields(line), " "))
		}
		return lines
	}
	for _, namespace := range []string{ns.name, "connectors-system", "kube-system", "default"} {
		everybody := rights("nobody", namespace)
		own := slices.DeleteFunc(rights("connectors-csi", namespace),
			func(line string) bool { return slices.Contains(everybody, line) })
		slices.Sort(own)
		if want := []string{"connectorclasses.connectors.alauda.io [] [] [get watch]",
			"serviceaccounts/token [] [] [create]"}; !slices.Equal(own, want) {
			t.Errorf("in namespace %s the driver has the rights %q", namespace, own)
		}
	}

	for field, want := range sorted(map[string]string{
		".spec.hostNetwork": "", ".spec.hostPID": "", ".spec.hostIPC": "", ".spec.initContainers": "",
		".spec.volumes[*].hostPath.path":                             "/var/lib/kubelet/pods /var/lib/kubelet/plugins_registry",
		".spec.volumes[*].secret":                                    "",
		".spec.volumes[*].configMap":                                 "",
		".spec.containers[*].name":                                   "csi-driver",
		".spec.containers[*].securityContext.readOnlyRootFilesystem": "true",
	}) {
		if got := driverPod(t, field); got != want {
			t.Errorf("the driver's Pod has %s %q, not %q", field, got, want)
		}
	}
	pod := driverPod(t, ".metadata.name")
	for _, program := range []string{"sh", "/bin/sh", "busybox"} {
		if _, err := cluster.Kubectl("--namespace=connectors-system", "exec", pod, "--", program); err == nil ||
			!strings.Contains(err.Error(), "no such file or directory") &&
				!strings.Contains(err.Error(), "not found in $PATH") {
			t.Errorf("%s in the driver's container: %v", program, err)
		}
	}
}

// kubeconfig writes one for the bearer of a token and returns its path.
func kubeconfig(t *testing.T, name, token string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, theNode.Kubeconfig(token), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
