package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What the driver may not: the capabilities that its process gives up, and what the API server itself refuses, as
// deploy.yaml tells it: tokens that the driver's ServiceAccount has no use for.

func TestDriversTokenIsGoodForThePodsOfItsNodeOnly(t *testing.T) {
	ns := begin(t)
	ns.target("rights", map[string]string{"token": "{{ .context.token }}"})
	ns.pod("pod", `{connector.name: target, configuration.names: config, token.expiration: 1h}`)
	ns.running("pod") // so the driver's own request is granted

	// Whoever has taken over the node has the driver's token and knows the uids of the node's Pods.
	tokens, err := filepath.Glob(kubeletPods + driverPod(t, ".metadata.uid") + "/volumes/kubernetes.io~projected/*/token")
	if err != nil || len(tokens) != 1 {
		t.Fatalf("the driver's token: %q, %v", tokens, err)
	}
	stolen := kubeconfig(t, "stolen", readFile(t, tokens[0]))
	made := kubeconfig(t, "made", driverNamespace(t).kubectl("create", "token", "connectors-csi"))
	request := func(as string, options ...string) error {
		_, err := kubectl(append([]string{"--kubeconfig", as, "--namespace", ns.name, "create", "token", "default"}, options...)...)
		return err
	}
	const kind, name = "--bound-object-kind=Pod", "--bound-object-name=pod"
	uid := "--bound-object-uid=" + ns.uid("pod")
	ns.kubectl("create", "secret", "generic", "secret")
	secretUID := "--bound-object-uid=" + ns.kubectl("get", "secret", "secret", "--output=jsonpath={.metadata.uid}")

	const policy = "ValidatingAdmissionPolicy 'connectors-csi-token' with binding 'connectors-csi-token' denied request: "
	const bound, lifetime = policy + "the driver may request tokens only that are bound to a Pod", policy + "the driver may request tokens only for"
	for _, c := range []struct {
		as, denied string
		options    []string
	}{
		{stolen, bound, nil},
		{stolen, bound, []string{kind, name}},
		{stolen, bound, []string{"--bound-object-kind=Secret", "--bound-object-name=secret", secretUID}},
		{stolen, "does not match the UID in record", []string{kind, name, "--bound-object-uid=6f4f6e2c-7a0b-4f0e-9d39-0d6b6f1d2c11"}},
		{stolen, lifetime, []string{kind, name, uid, "--duration=24h1s"}},
		{stolen, lifetime, []string{kind, name, uid, "--duration=48h"}},
		{stolen, lifetime, []string{kind, name, uid, "--duration=3607s"}},
		{made, policy + "the driver may request tokens only with a token that is bound", []string{kind, name, uid}},
	} {
		if err := request(c.as, c.options...); err == nil || !strings.Contains(err.Error(), c.denied) {
			t.Errorf("with options %q: %v; %q is expected", c.options, err, c.denied)
		}
	}
	for _, duration := range []string{"--duration=3606s", "--duration=24h"} {
		if err := request(stolen, kind, name, uid, duration); err != nil {
			t.Error(err)
		}
	}

	// And no uid of another node's Pod can be read with it.
	for _, resource := range []string{"pods", "events", "secrets"} {
		if _, err := kubectl("--kubeconfig", stolen, "get", resource, "--all-namespaces"); err == nil || !strings.Contains(err.Error(), "forbidden") {
			t.Errorf("the driver's token lets one list %s: %v", resource, err)
		}
	}
}

func TestDriverKeepsFewCapabilities(t *testing.T) {
	ns := begin(t)
	ns.target("rights", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.pod("pod", mountTarget)
	ns.running("pod")
	driver, err := new(watch).driver()
	if err != nil {
		t.Fatal(err)
	}
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", driver.pid))
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
	content := fmt.Sprintf(kubeconfigFormat, nodeIP, node.path("apiserver.crt"), token)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
