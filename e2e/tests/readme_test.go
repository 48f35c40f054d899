package tests

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/image"
	"connectors-csi/e2e/node"
	"connectors-csi/e2e/readme"
)

// The examples of docs/templates.md on a real node: the classes, the volumes, and what their files hold. A "…" there
// stands for the rest of a token.
func TestExamplesOfSeveral(t *testing.T) {
	beside(t, "--builtin-files")
	ns, team := namespace{t, "default"}, namespace{t, "team-a"} // as the section has them
	ns.kubectl("create", "namespace", team.name)
	t.Cleanup(func() { cluster.Kubectl("delete", "namespace", team.name, "--wait=false") })
	examples, err := readmeExamples("docs/templates.md", "More than one")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range examples {
		if e.class != "" {
			ns.apply(e.class)
		}
	}
	for _, c := range []struct {
		ns          namespace
		name, class string
	}{{team, "git-internal", "git-multi"}, {ns, "git-public", "git-multi"}, {ns, "npm", "npm-params"}} {
		c.ns.connector(c.name, c.class, "https://"+c.name+".example.com")
		c.ns.proxy("connector", c.name, fmt.Sprintf("http://c-%s.%s.svc.cluster.local", c.name, c.ns.name))
		t.Cleanup(func() { cluster.Kubectl("delete", "connector", c.name, "--namespace", c.ns.name) })
	}
	ns.allow("default", ns)
	team.allow("default", ns)
	t.Cleanup(func() { cluster.Kubectl("delete", "rolebinding", "default-default") })

	for title, want := range sorted(map[string]struct{ pod, file string }{
		"Several Connectors":            {"several-connectors", ".gitconfig"},
		"Parameters of a configuration": {"parameters", ".npmrc"},
		"Built-in files":                {"built-in-files", ".curlrc"},
	}) {
		ns.exampleHolds(want.pod, want.file, examples[title])
	}
}

// example is what one part of the section shows.
type example struct{ class, volumes, content string }

func readmeExamples(page, section string) (map[string]*example, error) {
	blocks, err := readme.Blocks(page, section)
	examples := map[string]*example{}
	for _, b := range blocks {
		e := examples[b.Title]
		if e == nil {
			e = new(example)
			examples[b.Title] = e
		}
		switch {
		case b.Language == "text":
			e.content = b.Text
		case strings.HasPrefix(b.Text, "volumes:"):
			e.volumes = b.Text
		default:
			e.class = b.Text
		}
	}
	return examples, err
}

var volumeName = regexp.MustCompile(`(?m)^- name: (.*)$`)

// exampleHolds runs a Pod with the example's volume and compares the file with what the example shows.
func (ns namespace) exampleHolds(pod, file string, e *example) {
	ns.Helper()
	if e == nil || e.content == "" || !volumeName.MatchString(e.volumes) {
		ns.Fatalf("docs/templates.md has no example with a volume and the content of %s", file)
	}
	manifest := cluster.PodManifest(pod, "{}")
	manifest = manifest[:strings.Index(manifest, "  volumes:")] + "  " + strings.ReplaceAll(strings.TrimSpace(e.volumes),
		"\n", "\n  ") + "\n"
	ns.apply(strings.Replace(manifest, "name: volume,", "name: "+volumeName.FindStringSubmatch(e.volumes)[1]+",", 1))
	ns.Cleanup(func() { cluster.Kubectl("delete", "pod", pod, "--wait=false") })
	ns.running(pod)
	pattern := strings.ReplaceAll(regexp.QuoteMeta(strings.TrimSpace(e.content)), "…", `[-_.=a-zA-Z0-9]+`)
	if got := ns.read(pod, "/volume/"+file); !regexp.MustCompile(`^` + pattern + `\s*$`).MatchString(got) {
		ns.Errorf("%s in Pod %s is\n%s\ndocs/templates.md shows\n%s", file, pod, got, e.content)
	}
}

func TestQuickStart(t *testing.T) {
	ns := begin(t)
	t.Cleanup(func() {
		cluster.Kubectl("delete", "--grace-period=1", "--timeout=2m", "pod/git-client", "rolebinding/git-client-connectors",
			"connector/git-connector")
		cluster.Kubectl("delete", "--wait=false", "--ignore-not-found", "-f", "../examples/proxy/client.yaml")
		cluster.Kubectl("delete", "--wait=false", "-k", "../examples/proxy")
	})
	steps, err := readme.Steps("README.md", "Quick start")
	more, moreErr := readme.Steps("docs/proxy.md", "Reach the target")
	if err = errors.Join(err, moreErr); err != nil {
		t.Fatal(err)
	}
	var shown []string // what the reader sees
	for _, step := range append(steps, more...) {
		if strings.Contains(step.Text, "rolebinding.yaml") {
			phase, err := cluster.Kubectl("get", "pod", "git-client", "--output=jsonpath={.status.phase}")
			if err != nil || phase != "Pending" {
				t.Errorf("before the RoleBinding the Pod is %q (%v)", phase, err)
			}
		}
		output, err := step.Run()
		if err != nil {
			t.Fatal(err)
		}
		shown = append(shown, output)
	}
	if len(steps) != 4 || len(more) != 3 {
		t.Fatalf("the quick start has %d and %d scripts", len(steps), len(more))
	}
	refusal, end := shown[2], shown[3]
	for _, part := range []string{
		"FailedMount", "code = PermissionDenied", `ServiceAccount default/default may not read Connector "default/git-connector"`,
		`User "system:serviceaccount:default:default" cannot get resource "connectors" in API group "connectors.alauda.io"`,
		"kubectl create rolebinding",
	} {
		if !strings.Contains(refusal, part) {
			t.Errorf("before the RoleBinding %q is expected in:\n%s", part, refusal)
		}
	}
	file := regexp.MustCompile(`(?m)^\[http "http://c-git-connector.default.svc.cluster.local"\]
    extraHeader = Authorization: (Basic .*)
\[url "http://c-git-connector.default.svc.cluster.local/"\]
    insteadOf = "https://git.example.com/"
\z`).FindStringSubmatch(end)
	if file == nil {
		t.Fatalf("not the .gitconfig that is expected:\n%s", end)
	}
	_, token, err := basicCredentials(file[1])
	if err != nil {
		t.Fatal(err)
	}
	ns.wantTokenOf(token, "default", "default", "git-client")
	if push := shown[5]; !strings.Contains(push, "main -> main") {
		t.Errorf("the push printed\n%s", push)
	}
	if refusal := shown[6]; !strings.Contains(refusal, "The requested URL returned error: 403") {
		t.Errorf("without the RoleBinding:\n%s", refusal)
	}

	// An operator's questions have answers.
	questions, err := readme.Steps("docs/operations.md", "Questions")
	if err != nil || len(questions) != 4 {
		t.Fatalf("%d questions, %v", len(questions), err)
	}
	const seconds = `\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`
	for i, want := range []string{
		`(?m)^git default/git-connector default/git-client ` + node.Name + `$`,
		`(?m)^pod/connectors-csi-\w+\nconnectors_csi_volumes [2-9]\n(?:connectors_csi_volumes_bytes \d{5,}\n|connectors_csi_volumes_budget_bytes 251658240\n){2}`,
		`(?m)^/var/lib/kubelet/pods/` + namespace{t, "default"}.uid("git-client") + `/volumes/kubernetes.io~csi/git-config/mount$`,
		`^issued ` + seconds + `, expires ` + seconds + `\n$`,
	} {
		if answer, err := questions[i].Run(); err != nil || !regexp.MustCompile(want).MatchString(answer) {
			t.Errorf("%v: the answer to question %d is not %s:\n%s", err, i, want, answer)
		}
	}
}

// The quick start on the page of the product's release 1.0: a Connector without a namespace and a status, the Pod
// first, the RoleBinding last. The image is the page's by name.
func TestPageOfRelease10(t *testing.T) {
	begin(t)
	ns := namespace{t, "default"}
	t.Cleanup(func() {
		cluster.Kubectl("delete", "--grace-period=1", "--timeout=2m", "pod/csi-demo",
			"rolebinding/default-sa-connectors-connector-viewer", "connector/git-connector")
		cluster.Kubectl("delete", "connectorclass", "my-git")
	})
	create := func(command, manifest string) {
		t.Helper()
		if _, err := cluster.KubectlStdin(manifest, command, "-f", "-"); err != nil {
			t.Fatal(err)
		}
	}
	create("apply", `
apiVersion: connectors.alauda.io/v1alpha1
kind: ConnectorClass
metadata:
  name: my-git
spec:
  address:
    type: string
  configurations:
  - name: config
    data:
      .gitconfig: |
        this is git config
`)
	create("apply", `
apiVersion: connectors.alauda.io/v1alpha1
kind: Connector
metadata:
  name: git-connector
spec:
  address: https://github.com
  connectorClassName: my-git
`)
	create("create", `
apiVersion: v1
kind: Pod
metadata:
  name: csi-demo
  namespace: default
spec:
  restartPolicy: Never
  containers:
  - name: web
    image: `+image.Release10+`
    imagePullPolicy: IfNotPresent
    command:
    - "sleep"
    args: [ "3600" ]
    volumeMounts:
    - name: git-config
      mountPath: /tmp/config
  volumes:
  - name: git-config
    csi:
      readOnly: true
      driver: connectors-csi
      volumeAttributes:
        connector.name: "git-connector"
        connector.namespace: "default"
        configuration.names: "config"
`)
	ns.refused("csi-demo", "code = PermissionDenied", `ServiceAccount default/default may not read Connector "default/git-connector"`)
	create("apply", `
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: default-sa-connectors-connector-viewer
  namespace: default
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: connectors-connector-viewer-role
subjects:
- kind: ServiceAccount
  name: default
  namespace: default
`)
	ns.running("csi-demo")
	if got := ns.read("csi-demo", "/tmp/config/.gitconfig"); got != "this is git config\n" {
		t.Errorf("the file is %q", got)
	}
}
