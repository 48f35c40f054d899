package tests

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectors-csi/e2e/cluster"
)

// What the driver's process may not: use the capabilities that it gives up. What the API server refuses is tried in
// policy_test.go.

func TestDriverKeepsFewCapabilities(t *testing.T) {
	ns := begin(t)
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
		for _, line := range []string{"CapInh:\t" + none, "CapPrm:\t" + kept, "CapEff:\t" + kept, "CapBnd:\t" + kept, "CapAmb:\t" + none, "NoNewPrivs:\t1"} {
			if !strings.Contains(status, "\n"+line+"\n") {
				t.Errorf("%s has no line %q:\n%s", thread, line, status)
			}
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
