package tests

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/image"
	"connectors-csi/e2e/node"
)

// deploy.yaml on clusters that are made otherwise than this one.

// GKE, among others, allows Pods of the driver's priority outside kube-system only where a quota provides for them.
func TestDriverRunsWhereItsPriorityNeedsAQuota(t *testing.T) {
	ns := begin(t)
	driver := driverNamespace(t)
	configuration := theNode.Path("admission.yaml")
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
		_, err := cluster.KubectlStdin(fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: critical}
spec: {priorityClassName: system-node-critical, containers: [{name: main, image: %s}]}
`, image.Client), "--namespace", in.name, "create", "--dry-run=server", "-f", "-")
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
		ns.apply(fmt.Sprintf("{apiVersion: v1, kind: Node, metadata: {name: %s, labels: {kubernetes.io/os: linux, %s}}}",
			name, label))
		t.Cleanup(func() { cluster.Kubectl("delete", "node", name, "--ignore-not-found") })
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
	wantNodes("auto", "hybrid", node.Name)
	ns.kubectl("delete", "node", "auto", "hybrid")
	driver.kubectl("rollout", "restart", "daemonset/connectors-csi")
	awaitDriver(t) // with the two that are left
	wantNodes(node.Name)
}

func TestDeployYAMLIsValidAndAppliesWithoutChange(t *testing.T) {
	begin(t)
	const manifest = "../deploy.yaml"
	// An older API server drops this one field of the CSIDriver, so kubectl finds it missing each time.
	const newField = `unknown field "spec.serviceAccountTokenInSecrets"`
	_, err := cluster.Kubectl("apply", "--validate=strict", "--dry-run=server", "-f", manifest)
	if cluster.KnowsAllFields() && err != nil {
		t.Error(err)
	}
	if !cluster.KnowsAllFields() && (err == nil || !strings.HasSuffix(err.Error(), "strict decoding error: "+newField)) {
		t.Errorf("%v; nothing but %s is expected", err, newField)
	}
	for line := range strings.Lines(installDriver(t)) {
		drops := !cluster.KnowsAllFields() && line == "csidriver.storage.k8s.io/connectors-csi configured\n"
		if !strings.HasSuffix(line, " unchanged\n") && !drops {
			t.Errorf("applied again: %s", line)
		}
	}

	names := func(selection ...string) []string {
		output, err := cluster.Kubectl(append([]string{"apply", "--dry-run=client", "--output=name", "-f", manifest},
			selection...)...)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(output)
	}
	driver := names("--selector=app.kubernetes.io/component=driver")
	rest := slices.DeleteFunc(names(), func(name string) bool { return slices.Contains(driver, name) })
	slices.Sort(rest)
	if want := []string{
		"clusterrole.rbac.authorization.k8s.io/connectors-connector-viewer-role",
		"customresourcedefinition.apiextensions.k8s.io/connectorclasses.connectors.alauda.io",
		"customresourcedefinition.apiextensions.k8s.io/connectors.connectors.alauda.io",
	}; !slices.Equal(rest, want) {
		t.Errorf("with the label of the driver these are left out: %q, not %q", rest, want)
	}
}
