package tests

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"connectors-csi/e2e/cluster"
)

// installOldDriver applies the old deploy.yaml, as docs/operations.md says how to go back.
func installOldDriver(t *testing.T, args ...string) {
	t.Helper()
	manifest, err := cluster.OldManifest()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cluster.Kubectl(cluster.ForgetPolicy...); err != nil {
		t.Fatal(err)
	}
	applyManifest(t, manifest, args...)
	awaitDriver(t)
	if used := driverPod(t, ".spec.containers[0].image"); used != cluster.OldImage {
		t.Fatalf("the old driver is not installed, the image is %s", used)
	}
}

// Pods that the old driver has given volumes which a new Pod would not get any more: too many, and too large ones.
// They keep them, their tokens and their Connectors' changes, through the upgrade and back.
func TestUpgradeAndRollback(t *testing.T) {
	unmeasured(t)
	installOldDriver(t, quickRefresh)
	ns := newNamespace(t)
	ns.target("upgraded", map[string]string{"address": "{{ .connector.spec.address }}", "token": "{{ .context.token }}"})
	ns.class("large", configurations{"config": {
		"address": "{{ .connector.spec.address }}", "token": "{{ .context.token }}", "large": `{{ repeat 921600 "x" }}`,
	}})
	ns.connector("large", "large", "https://one.example.com")
	ns.connector("injection", "upgraded", "https://one.example.com\n[core]")
	ns.watcher("watcher")
	ns.pod("hour", `{connector.name: target, configuration.names: config, token.expiration: 1h}`)
	ns.pod("injected", `{connector.name: injection, configuration.names: config}`)
	ns.apply(podOfVolumes("many", 20, mountTarget))
	ns.apply(podOfVolumes("large", 4, `{connector.name: large, configuration.names: config}`))
	pods := []string{"watcher", "hour", "injected", "many", "large"}
	ns.running(pods...)
	uids := map[string]string{}
	for _, pod := range pods {
		uids[pod] = ns.uid(pod)
	}
	mount := ns.wantOneMount(uids["watcher"])

	follow := func(address string) {
		t.Helper()
		tokens := map[string]string{}
		for _, dir := range ns.volumes(uids) {
			tokens[dir] = readFile(t, dir+"/token")
		}
		restartKubelet(ns) // it has no tokens then, and asks for new ones
		for _, connector := range []string{"target", "large"} {
			ns.kubectl("patch", "connector", connector, "--type=merge", "--patch",
				fmt.Sprintf(`{"spec": {"address": %q}}`, address))
		}
		for dir, before := range tokens {
			if strings.Contains(dir, uids["injected"]) {
				continue // see below
			}
			ns.eventually(func() error {
				// A token that the driver asked for is not kubelet's to renew.
				if renewed := readFile(t, dir+"/token") != before; !renewed && !strings.Contains(dir, uids["hour"]) {
					return fmt.Errorf("%s still has the token of before", dir)
				}
				if got := readFile(t, dir+"/address"); got != address {
					return fmt.Errorf("%s has the address %q, not %q", dir, got, address)
				}
				return nil
			})
		}
	}
	follow("https://two.example.com")

	installDriver(t, quickRefresh)
	if used := driverPod(t, ".spec.containers[0].image"); used == cluster.OldImage {
		t.Fatal("the driver was not upgraded")
	}
	follow("https://three.example.com")
	// What a Connector's author must not do is refused; what he did before stays in the Pod, and in the API server.
	ns.failedMount("injected", "code = FailedPrecondition", "spec.address")
	ns.want("injected", "/volume/address", "https://one.example.com\n[core]")
	ns.kubectl("label", "connector", "injection", "kept=yes")
	ns.apply(podOfVolumes("many-again", 20, mountTarget))
	ns.failedMount("many-again", "code = ResourceExhausted", "volumes")
	installOldDriver(t, quickRefresh)
	ns.running("many-again")
	follow("https://four.example.com")

	ns.wantNoMiss("watcher")
	ns.wantSameMount(uids["watcher"], mount)
	for pod, restarts := range ns.restarts() {
		if restarts != "0" {
			t.Errorf("the container of Pod %s was restarted %s times", pod, restarts)
		}
	}
	installDriver(t)
	ns.kubectl("delete", "pods", "--all", "--timeout=2m")
	for _, uid := range uids {
		ns.gone(uid)
	}
}

// podOfVolumes returns a Pod like that of cluster.PodManifest with several volumes of the same attributes.
func podOfVolumes(name string, volumes int, attributes string) string {
	manifest, _, _ := strings.Cut(cluster.PodManifest(name, attributes), "  volumes:")
	manifest, _, _ = strings.Cut(manifest, "    volumeMounts:")
	mounts, list := "    volumeMounts:\n", "  volumes:\n"
	for i := range volumes {
		mounts += fmt.Sprintf("    - {name: volume-%d, mountPath: /volume-%d}\n", i, i)
		list += fmt.Sprintf("  - {name: volume-%d, csi: {driver: connectors-csi, readOnly: true, volumeAttributes: %s}}\n", i,
			attributes)
	}
	return manifest + mounts + list
}

// volumes returns where the volumes of Pods are mounted on the node.
func (ns namespace) volumes(uids map[string]string) (dirs []string) {
	ns.Helper()
	for pod, uid := range uids {
		lines := cluster.Mounts(uid)
		if len(lines) == 0 {
			ns.Fatal(errors.New("no volume is mounted for Pod " + pod))
		}
		for _, line := range lines {
			dirs = append(dirs, strings.Fields(line)[4])
		}
	}
	return dirs
}

// restarts returns how often the containers of the namespace's Pods were restarted, by Pod.
func (ns namespace) restarts() map[string]string {
	ns.Helper()
	restarts := map[string]string{}
	for line := range strings.Lines(ns.kubectl("get", "pods",
		"--output", `jsonpath={range .items[*]}{.metadata.name} {.status.containerStatuses[0].restartCount}{"\n"}{end}`)) {
		pod, count, _ := strings.Cut(strings.TrimSpace(line), " ")
		restarts[pod] = count
	}
	return restarts
}
