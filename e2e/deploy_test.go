package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// deploy.yaml on clusters that are made otherwise than this one.

// GKE, among others, allows Pods of the driver's priority outside kube-system only where a quota provides for them.
func TestDriverRunsWhereItsPriorityNeedsAQuota(t *testing.T) {
	ns := begin(t)
	driver := driverNamespace(t)
	configuration := node.path("admission.yaml")
	if err := os.WriteFile(configuration, []byte(`
apiVersion: apiserver.config.k8s.io/v1
kind: AdmissionConfiguration
plugins:
- name: ResourceQuota
  configuration:
    apiVersion: apiserver.config.k8s.io/v1
    kind: ResourceQuotaConfiguration
    limitedResources:
    - resource: pods
      matchScopes:
      - {scopeName: PriorityClass, operator: In, values: [system-node-critical, system-cluster-critical]}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	restartAPIServer(ns, "--admission-control-config-file="+configuration)
	critical := func(in namespace) error {
		_, err := kubectlStdin(fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: critical}
spec: {priorityClassName: system-node-critical, containers: [{name: main, image: %s}]}
`, clientImage), "--namespace", in.name, "create", "--dry-run=server", "-f", "-")
		return err
	}
	const refused = "insufficient quota to match these scopes"
	ns.wantDenied(refused, func() error { return critical(ns) })
	ns.eventually(func() error { return critical(driver) })
	freshDriver(t)

	driver.kubectl("delete", "resourcequota", "connectors-csi")
	ns.wantDenied(refused, func() error { return critical(driver) })
	installDriver(t)
	ns.eventually(func() error { return critical(driver) })
}

// A node without a kubelet never runs the driver: it would be waited for until the end of days.
func TestDriverStaysAwayFromVirtualNodes(t *testing.T) {
	ns := begin(t)
	driver := driverNamespace(t)
	labels := map[string]string{
		"virtual": "type: virtual-kubelet", "fargate": "eks.amazonaws.com/compute-type: fargate",
		"auto": "eks.amazonaws.com/compute-type: auto", "hybrid": "eks.amazonaws.com/compute-type: hybrid",
	}
	for name, label := range sorted(labels) {
		ns.apply(fmt.Sprintf("{apiVersion: v1, kind: Node, metadata: {name: %s, labels: {kubernetes.io/os: linux, %s}}}", name, label))
		t.Cleanup(func() { kubectl("delete", "node", name, "--ignore-not-found") })
	}
	wantNodes := func(want ...string) {
		t.Helper()
		ns.eventually(func() error {
			const field = "{.items[*].spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchFields[0].values[0]}"
			nodes := strings.Fields(driver.kubectl("get", "pods", driverPods, "--output=jsonpath="+field))
			desired := driver.kubectl("get", "daemonset", "connectors-csi", "--output=jsonpath={.status.desiredNumberScheduled}")
			if slices.Sort(nodes); !slices.Equal(nodes, want) || desired != fmt.Sprint(len(want)) {
				return fmt.Errorf("the driver has Pods for the nodes %q, and is to have %s; %q are expected", nodes, desired, want)
			}
			return nil
		})
	}
	wantNodes("auto", "hybrid", nodeName)
	ns.kubectl("delete", "node", "auto", "hybrid")
	driver.kubectl("rollout", "restart", "daemonset/connectors-csi")
	awaitDriver(t) // with the two that are left
	wantNodes(nodeName)
}
