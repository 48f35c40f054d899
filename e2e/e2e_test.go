package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"
)

// Every test has one real Kubernetes node, real Pods, and the driver as a user installs it, and asserts what
// a user sees: events, files inside containers, the API. They run one after the other, since many disturb
// the node.

func TestQuickStart(t *testing.T) {
	ns := begin(t)
	t.Cleanup(func() {
		kubectl("delete", "--grace-period=1", "--timeout=2m", "pod/git-client", "rolebinding/git-client-connectors", "connector/git-connector")
		kubectl("delete", "--wait=false", "--ignore-not-found", "-f", "../examples/proxy/client.yaml")
		kubectl("delete", "--wait=false", "-k", "../examples/proxy")
	})
	steps, err := readmeSteps("README.md", "Quick start")
	more, moreErr := readmeSteps("docs/proxy.md", "Reach the target")
	if err = errors.Join(err, moreErr); err != nil {
		t.Fatal(err)
	}
	var shown []string // what the reader sees
	for _, step := range append(steps, more...) {
		if strings.Contains(step.text, "rolebinding.yaml") {
			phase, err := kubectl("get", "pod", "git-client", "--output=jsonpath={.status.phase}")
			if err != nil || phase != "Pending" {
				t.Errorf("before the RoleBinding the Pod is %q (%v)", phase, err)
			}
		}
		output, err := step.run()
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
}

func TestDeployYAMLIsValidAndAppliesWithoutChange(t *testing.T) {
	begin(t)
	const manifest = "../deploy.yaml"
	// An older API server drops this one field of the CSIDriver, so kubectl finds it missing each time.
	const newField = `unknown field "spec.serviceAccountTokenInSecrets"`
	_, err := kubectl("apply", "--validate=strict", "--dry-run=server", "-f", manifest)
	if knowsAllFields() && err != nil {
		t.Error(err)
	}
	if !knowsAllFields() && (err == nil || !strings.HasSuffix(err.Error(), "strict decoding error: "+newField)) {
		t.Errorf("%v; nothing but %s is expected", err, newField)
	}
	for line := range strings.Lines(installDriver(t)) {
		drops := !knowsAllFields() && line == "csidriver.storage.k8s.io/connectors-csi configured\n"
		if !strings.HasSuffix(line, " unchanged\n") && !drops {
			t.Errorf("applied again: %s", line)
		}
	}

	names := func(selection ...string) []string {
		output, err := kubectl(append([]string{"apply", "--dry-run=client", "--output=name", "-f", manifest}, selection...)...)
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

func TestOfSeveralConfigurationsTheLaterWins(t *testing.T) {
	ns := begin(t)
	ns.class("layers", configurations{
		"base": {"settings": "base for {{ .connector.spec.address }}", "only-base": "base"},
		"team": {"settings": "team for {{ .connector.spec.address }}", "only-team": "team"},
		"more": {"not-asked-for": ""},
	})
	ns.connector("target", "layers", "https://one.example.com")
	ns.allow("default", ns)
	ns.pod("team-last", `{connector.name: target, configuration.names: "base,team"}`)
	ns.pod("base-last", `{connector.name: target, configuration.names: "team, base"}`)
	ns.running("team-last", "base-last")

	ns.want("team-last", "/volume/settings", "team for https://one.example.com")
	ns.want("base-last", "/volume/settings", "base for https://one.example.com")
	for _, pod := range []string{"team-last", "base-last"} {
		ns.want(pod, "/volume/only-base", "base")
		ns.want(pod, "/volume/only-team", "team")
		ns.wantFiles(pod, "/volume", "only-base", "only-team", "settings")
	}
}

func TestConnectorInAnotherNamespace(t *testing.T) {
	ns := begin(t)
	other := newNamespace(t)
	ns.class("elsewhere", configurations{"config": {"address": "{{ .connector.spec.address }}"}})
	other.connector("open", "elsewhere", "https://open.example.com")
	other.connector("closed", "elsewhere", "https://closed.example.com")
	other.kubectl("create", "role", "open", "--verb=get", "--resource=connectors.connectors.alauda.io", "--resource-name=open")
	other.kubectl("create", "rolebinding", "open", "--role=open", "--serviceaccount="+ns.name+":default")

	ns.pod("allowed", fmt.Sprintf(`{connector.name: open, connector.namespace: %s, configuration.names: config}`, other.name))
	ns.running("allowed")
	ns.want("allowed", "/volume/address", "https://open.example.com")

	// Not allowed: the event says so, and the command that it names helps.
	ns.pod("refused", fmt.Sprintf(`{connector.name: closed, connector.namespace: %s, configuration.names: config}`, other.name))
	message := ns.refused("refused", "code = PermissionDenied",
		fmt.Sprintf(`ServiceAccount %s/default may not read Connector "%s/closed"`, ns.name, other.name))
	_, command, found := strings.Cut(strings.TrimSpace(message), "Allow it with: ")
	if !found {
		t.Fatalf("the event names no remedy: %s", message)
	}
	if err := run("bash", "-c", command); err != nil {
		t.Fatal(err)
	}
	ns.running("refused")
	ns.want("refused", "/volume/address", "https://closed.example.com")
}

func TestTokenIsThatOfThePod(t *testing.T) {
	ns := begin(t)
	ns.target("token", map[string]string{"token": "{{ .context.token }}"})
	const mountForAnHour = `{connector.name: target, configuration.names: config, token.expiration: 1h}`
	ns.kubectl("patch", "connectorclass", "token", "--type=merge", "--patch", `{"spec": {"proxy": {"audience": "the-proxy"}}}`)
	for connector, audience := range sorted(map[string]string{"audience": "the-proxy", "other-audience": "vault"}) {
		ns.connector(connector, "token", "https://one.example.com")
		ns.kubectl("patch", "connector", connector, "--subresource=status", "--type=merge",
			"--patch", fmt.Sprintf(`{"status": {"proxy": {"httpAddress": {"audience": %q}}}}`, audience))
	}
	ns.pod("default", mountTarget)
	ns.pod("hour", mountForAnHour)
	ns.pod("audience", `{connector.name: audience, configuration.names: config}`)
	ns.pod("other-audience", `{connector.name: other-audience, configuration.names: config}`)
	ns.running("default", "hour", "audience")
	ns.refused("other-audience", "code = FailedPrecondition", `the audience "vault" in its status.proxy.httpAddress is neither one that ConnectorClass "token" names`)
	audiences := map[string][]string{} // by Pod
	for pod, lifetime := range sorted(map[string]time.Duration{"default": 30 * time.Minute, "hour": time.Hour, "audience": 30 * time.Minute}) {
		token := ns.read(pod, "/volume/token")
		ns.wantTokenOf(token, ns.name, "default", pod)
		c := ns.claims(token)
		if got := c.lifetime(); got != lifetime {
			t.Errorf("the token in Pod %s is made for %v, not for %v", pod, got, lifetime)
		}
		audiences[pod] = c.Audiences
	}
	if !slices.Equal(audiences["hour"], audiences["default"]) ||
		!slices.Equal(audiences["audience"], append(audiences["default"], "the-proxy")) {
		t.Errorf("the tokens' audiences are %v", audiences)
	}

	// Without the permission to request tokens only other expirations are refused.
	ns.kubectl("delete", "clusterrolebinding", "connectors-csi-token")
	ns.pod("default-again", mountTarget)
	ns.pod("hour-again", mountForAnHour)
	ns.running("default-again")
	ns.refused("hour-again", "code = PermissionDenied", "the driver may not request a token for ServiceAccount "+ns.name+"/default",
		"needs the ClusterRole connectors-csi-token and its binding")
	installDriver(t)
	ns.running("hour-again")
}

func TestServiceAccountsShareAConnectorButNoToken(t *testing.T) {
	ns := begin(t)
	ns.target("shared", map[string]string{"token": "{{ .context.token }}"})
	ns.pod("default", mountTarget)
	for _, account := range []string{"builder", "stranger"} {
		ns.kubectl("create", "serviceaccount", account)
		ns.pod(account, mountTarget, "serviceAccountName: "+account)
	}
	ns.allow("builder", ns)
	ns.running("default", "builder")
	for _, account := range []string{"default", "builder"} {
		ns.wantTokenOf(ns.read(account, "/volume/token"), ns.name, account, account)
	}
	// The node has read the Connector by now. That helps nobody who may not.
	ns.refused("stranger", "ServiceAccount "+ns.name+"/stranger may not read Connector")
}

func TestChangesReachRunningPodsWhichCannotWrite(t *testing.T) {
	ns := begin(t)
	ns.target("changes", map[string]string{"address": "{{ .connector.spec.address }}", "text": "first"})
	ns.pod("pod", mountTarget)
	ns.running("pod")
	ns.want("pod", "/volume/text", "first")

	began := time.Now()
	ns.kubectl("patch", "connectorclass", "changes", "--type=merge", "--patch",
		`{"spec": {"configurations": [{"name": "config", "data": {"address": "{{ .connector.spec.address }}", "text": "second", "new": "file"}}]}}`)
	ns.moveTo("https://two.example.com", "pod", "/volume/address")
	ns.eventually(func() error { return ns.has("pod", "/volume/text", "second") })
	ns.want("pod", "/volume/new", "file")
	t.Logf("the changes of the Connector and of the class were in the container after %v", time.Since(began).Round(time.Second))

	for _, command := range []string{
		"echo mine > /volume/text", "echo mine > /volume/mine", "rm /volume/text", "chmod 600 /volume/..data/text", "rm -r /volume/..data/",
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
// ServiceAccount and of one of another long before kubelet's next call. The times include kubectl's own.
func TestChangesArriveWithoutKubelet(t *testing.T) {
	ns := begin(t)
	files := map[string]string{
		"address": "{{ .connector.spec.address }}", "status": `{{ index .connector.status "proxyAddress" }}`, "class": "0",
	}
	ns.target("pushed", files)
	status := func(i int) string { return fmt.Sprintf(`{"status": {"proxyAddress": "http://proxy-%d"}}`, i) }
	ns.kubectl("patch", "connector", "target", "--subresource=status", "--type=merge", "--patch", status(0))
	ns.kubectl("create", "serviceaccount", "builder")
	ns.allow("builder", ns)
	ns.pod("one", mountTarget)
	ns.pod("two", mountTarget)
	ns.pod("builder", mountTarget, "serviceAccountName: builder")
	ns.running("one", "two", "builder")
	var dirs []string
	for _, uid := range ns.uids() {
		dirs = append(dirs, volumeDir(uid, "volume"))
	}
	for _, c := range []struct {
		what, file, content string // the content has the change's number
		patch               func(i int) []string
	}{
		{"Connector", "address", "https://host-%d", func(i int) []string {
			return []string{"connector", "target", "--patch", fmt.Sprintf(`{"spec": {"address": "https://host-%d"}}`, i)}
		}},
		{"status", "status", "http://proxy-%d", func(i int) []string {
			return []string{"connector", "target", "--subresource=status", "--patch", status(i)}
		}},
		{"class", "class", "%d", func(i int) []string {
			files["class"] = strconv.Itoa(i)
			data, _ := json.Marshal(files)
			return []string{"connectorclass", "pushed", "--patch", fmt.Sprintf(`{"spec": {"configurations": [{"name": "config", "data": %s}]}}`, data)}
		}},
	} {
		var took []time.Duration
		for i := 1; i <= 50; i++ {
			time.Sleep(1100 * time.Millisecond) // a volume is pushed once a second, and the first change is what is measured
			began := time.Now()
			ns.kubectl(append([]string{"patch", "--type=merge"}, c.patch(i)...)...)
			for _, dir := range dirs {
				awaitFile(t, filepath.Join(dir, c.file), fmt.Sprintf(c.content, i))
			}
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		t.Logf("a change of the %s is in all three Pods after p50 %v, p99 %v", c.what,
			took[24].Round(time.Millisecond), took[49].Round(time.Millisecond))
		if took[24] > 10*time.Second {
			t.Errorf("%s: half of the changes took longer than %v: kubelet brought them", c.what, took[24])
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

func TestNonRootPodsInARestrictedNamespace(t *testing.T) {
	ns := begin(t)
	ns.target("restricted", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.kubectl("label", "namespace", ns.name, "pod-security.kubernetes.io/enforce=restricted")
	if _, err := kubectl("--namespace", ns.name, "run", "root", "--image=root", "--dry-run=server"); err == nil {
		t.Fatal("the namespace does not enforce anything")
	}
	for _, pod := range []struct{ name, fsGroup, file, dir string }{
		{"without-group", "", "444 0 0", "555 0 0"},
		{"with-group", "fsGroup: 2000", "440 0 2000", "550 0 2000"},
	} {
		ns.apply(fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 1
  securityContext:
    runAsNonRoot: true
    runAsUser: 1000
    runAsGroup: 1000
    seccompProfile: {type: RuntimeDefault}
    %s
  containers:
  - name: main
    image: %s
    command: [sleep, infinity]
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    volumeMounts: [{name: volume, mountPath: /volume}]
  volumes:
  - {name: volume, csi: {driver: connectors-csi, readOnly: true, volumeAttributes: %s}}
`, pod.name, pod.fsGroup, clientImage, mountTarget))
		ns.running(pod.name)
		ns.want(pod.name, "/volume/address", "https://one.example.com")
		modes, err := ns.sh(pod.name, "id -u; stat -Lc '%a %u %g' /volume/address /volume /volume/..data")
		if want := "1000\n" + pod.file + "\n" + pod.dir + "\n" + pod.dir; err != nil || modes != want {
			t.Errorf("Pod %s: user ID, then mode, owner and group of file and directories are %q (%v), not %q", pod.name, modes, err, want)
		}
	}
}

func TestEventsSayWhatIsWrong(t *testing.T) {
	ns := begin(t)
	ns.target("wrong", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.class("broken", configurations{"config": {"file": "first line\n{{ .connector.spec.address | shout }}"}})
	ns.class("prints-nothing", configurations{"config": {"file": "first line\n{{ .connector.spec.nothing }}"}})
	ns.connector("broken", "broken", "https://one.example.com")
	ns.connector("prints-nothing", "prints-nothing", "https://one.example.com")
	ns.connector("no-class", "of-no-class", "https://one.example.com")

	cases := []struct{ pod, attributes, reason string }{
		{"writable", mountTarget,
			"code = InvalidArgument desc = the volume must be read-only: set csi.readOnly: true in the Pod's volume"},
		{"unknown-attribute", `{connector.nam: target, configuration.names: config}`,
			`code = InvalidArgument desc = unknown attribute "connector.nam" in volumeAttributes: known are configuration.names, `},
		{"no-connector", `{configuration.names: config}`,
			"code = InvalidArgument desc = connectors or connector.name is required in volumeAttributes"},
		{"missing-connector", `{connector.name: nobody, configuration.names: config}`,
			`code = NotFound desc = Connector "` + ns.name + `/nobody" not found: create it, or correct connector.name`},
		{"missing-class", `{connector.name: no-class, configuration.names: config}`,
			`code = NotFound desc = ConnectorClass "of-no-class" of Connector "` + ns.name + `/no-class" not found`},
		{"missing-configuration", `{connector.name: target, configuration.names: confg}`,
			`code = InvalidArgument desc = configuration "confg" of configuration.names does not exist; ConnectorClass "wrong" has: config`},
		{"broken-template", `{connector.name: broken, configuration.names: config}`,
			`code = FailedPrecondition desc = ConnectorClass "broken", configuration "config": file line 2: function "shout" not defined`},
		{"printed-nothing", `{connector.name: prints-nothing, configuration.names: config}`,
			`code = FailedPrecondition desc = ConnectorClass "prints-nothing", configuration "config": file line 2: {{ .connector.spec.nothing }} has no value`},
	}
	for _, c := range cases {
		manifest := podManifest(c.pod, c.attributes)
		if c.pod == "writable" {
			manifest = strings.Replace(manifest, "readOnly: true, ", "", 1)
		}
		ns.apply(manifest)
	}
	for _, c := range cases {
		ns.refused(c.pod, `MountVolume.SetUp failed for volume "volume"`, c.reason)
	}
}

// A git client clones through a proxy, with nothing but the documented .gitconfig.
func TestGitClonesThroughTheProxy(t *testing.T) {
	ns := begin(t)
	ns.kubectl("apply", "-f", "../examples/git/class.yaml") // "git"
	proxy := ns.reverseProxy(gitServer(t), "server")
	ns.connector("server", "git", "https://git.example.com")
	ns.proxy("connector", "server", proxy)
	ns.allow("default", ns)
	ns.pod("pod", `{connector.name: server, configuration.names: config}`)
	ns.running("pod")
	clone := func(options string) (string, error) {
		return ns.sh("pod", "export HOME=/volume; cd /tmp && rm -rf app && git "+options+
			" clone -q https://git.example.com/team/app.git && cat app/greeting")
	}

	if output, err := clone(""); err != nil || output != "hello" {
		t.Fatalf("git clone: %v: %s", err, output)
	}
	if output, err := clone("-c http." + proxy + ".extraHeader="); err == nil || !strings.Contains(output, "could not read Username") {
		t.Errorf("the proxy lets one in without a token: %v: %s", err, output)
	}

	// A restarted kubelet has no tokens and asks for new ones.
	dir := volumeDir(ns.uid("pod"), "volume")
	before := readFile(t, dir+"/.gitconfig")
	header := regexp.MustCompile("Basic (.*)").FindStringSubmatch(before)[1]
	decoded, err := base64.StdEncoding.DecodeString(header)
	if err != nil {
		t.Fatal(err)
	}
	restartKubelet(ns)
	ns.eventually(func() error {
		if readFile(t, dir+"/.gitconfig") == before {
			return errors.New("the file still has the token of before kubelet's restart")
		}
		return nil
	})
	if output, err := clone(""); err != nil || output != "hello" {
		t.Errorf("git clone with the renewed token: %v: %s", err, output)
	}
	ns.eventually(func() error { // the next refresh removes the files of before
		for path, content := range filesBelow(t, dir) {
			if strings.Contains(content, header) || strings.Contains(content, strings.TrimPrefix(string(decoded), ":")) {
				return fmt.Errorf("%s still has the old token", path)
			}
		}
		return nil
	})

	// The proxy asks the API server each time.
	ns.kubectl("delete", "rolebinding", "--all")
	if output, err := clone(""); err == nil || !strings.Contains(output, "403") {
		t.Errorf("the proxy lets one in who may not read the Connector any more: %v: %s", err, output)
	}
}

func TestHundredPodsAtOnce(t *testing.T) {
	ns := begin(t)
	ns.target("load", map[string]string{"address": "{{ .connector.spec.address }}", "token": "{{ .context.token }}"})
	const pods = 100
	created := ns.deploy("load", pods, mountTarget)
	uids := ns.uids()
	if len(uids) != pods {
		t.Errorf("there are %d Pods, not %d", len(uids), pods)
	}
	for _, uid := range uids {
		ns.wantOneMount(uid)
		dir := volumeDir(uid, "volume")
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

func TestSubPathAndTwoVolumes(t *testing.T) {
	ns := begin(t, quickRefresh)
	ns.target("first", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.class("second", configurations{"config": {"text": "of the second volume"}})
	ns.connector("second", "second", "https://second.example.com")
	const mount = "mountPath: /volume}"
	manifest := podManifest("pod", mountTarget,
		"- {name: two, csi: {driver: connectors-csi, readOnly: true, volumeAttributes: {connector.name: second, configuration.names: config}}}")
	ns.apply(strings.Replace(manifest, mount, mount+`
    - {name: volume, mountPath: /etc/address, subPath: address}
    - {name: two, mountPath: /two}`, 1))
	ns.running("pod")
	ns.want("pod", "/volume/address", "https://one.example.com")
	ns.want("pod", "/etc/address", "https://one.example.com")
	ns.want("pod", "/two/text", "of the second volume")

	ns.moveTo("https://two.example.com", "pod", "/volume/address")
	ns.want("pod", "/etc/address", "https://one.example.com") // as documented: a subPath is never refreshed
	if output, err := ns.sh("pod", "echo mine > /etc/address"); err == nil || !strings.Contains(output, "Read-only file system") {
		t.Errorf("the container can write through subPath: %v: %s", err, output)
	}
	uid := ns.uid("pod")
	ns.deletePod("pod")
	ns.gone(uid)
}

// In a Pod with a user namespace of its own, the IDs of the container are others on the node. Kubelet has the
// volume mounted so that the container sees the owners as they are.
func TestPodsInAUserNamespaceOfTheirOwn(t *testing.T) {
	if release := os.Getenv(envKubernetes); release != "" && release < "1.33" {
		t.Skip("before 1.33 the feature gate UserNamespacesSupport is off, and hostUsers has no effect")
	}
	ns := begin(t, quickRefresh)
	ns.target("user-namespaces", map[string]string{"address": "{{ .connector.spec.address }}"})
	for _, pod := range []struct{ name, securityContext, stat string }{
		{"root", "{}", "0\n444 0 0\n555 0 0"},
		{"with-group", "{runAsUser: 1000, runAsGroup: 1000, fsGroup: 2000}", "1000\n440 0 2000\n550 0 2000"},
	} {
		ns.pod(pod.name, mountTarget, "hostUsers: false", "securityContext: "+pod.securityContext)
		ns.running(pod.name)
		ns.want(pod.name, "/volume/address", "https://one.example.com")
		seen, err := ns.sh(pod.name, "id -u; stat -Lc '%a %u %g' /volume/address /volume")
		if err != nil || seen != pod.stat {
			t.Errorf("Pod %s: user ID, then mode, owner and group of file and directory are %q (%v), not %q", pod.name, seen, err, pod.stat)
		}
		if of, err := ns.sh(pod.name, "cat /proc/self/uid_map"); err != nil || slices.Equal(strings.Fields(of)[:2], []string{"0", "0"}) {
			t.Errorf("Pod %s has the node's users: %v: %s", pod.name, err, of)
		}
		if mount, err := ns.sh(pod.name, "grep ' /volume ' /proc/self/mountinfo"); err != nil || !strings.Contains(mount, "idmapped") {
			t.Errorf("the volume of Pod %s is not mounted for its user namespace: %v: %s", pod.name, err, mount)
		}
	}
	ns.moveTo("https://two.example.com", "root", "/volume/address")
	ns.eventually(func() error { return ns.has("with-group", "/volume/address", "https://two.example.com") })
	for _, pod := range []string{"root", "with-group"} {
		uid := ns.uid(pod)
		ns.wantOneMount(uid)
		ns.deletePod(pod)
		ns.gone(uid)
	}
}

// watcher creates a Pod that reads /volume/address over and over, and says so when it is not an address.
func (ns namespace) watcher(name string) {
	ns.Helper()
	manifest := podManifest(name, mountTarget)
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
	ns := begin(t, quickRefresh)
	ns.target("refresh", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.watcher("pod")
	mount := ns.wantOneMount(ns.uid("pod"))

	// Neither a broken class nor a withdrawn permission takes anything from a running Pod; its events tell.
	ns.class("refresh", configurations{"config": {"address": "{{ .connector.spec.nothing }}"}})
	ns.failedMount("pod", "{{ .connector.spec.nothing }} has no value")
	ns.want("pod", "/volume/address", "https://one.example.com")
	ns.class("refresh", configurations{"config": {"address": "{{ .connector.spec.address }}"}})
	ns.kubectl("delete", "rolebinding", "--all")
	ns.kubectl("patch", "connector", "target", "--type=merge", "--patch", `{"spec": {"address": "https://kept-away.example.com"}}`)
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

	driverNamespace(t).kubectl("set", "image", "daemonset/connectors-csi", "csi-driver="+upgradeImage)
	awaitDriver(t)
	if image := driverPod(t, ".spec.containers[0].image"); image != upgradeImage {
		t.Errorf("the driver was not upgraded, its image is %s", image)
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

	node.apiServer.stop()
	refreshed := await(limit, func() error { // kubelet goes on calling the driver, which can read nothing
		metrics, err := httpGet(driver + "/metrics")
		if err == nil && !strings.Contains(metrics, `connectors_csi_publish_total{code="Unavailable"}`) {
			err = fmt.Errorf("no publish has failed:\n%s", metrics)
		}
		return err
	})
	address, err := os.ReadFile(volumeDir(uid, "volume") + "/address")
	node.apiServer = node.restart(node.apiServer) // before anything can end the test: the others need it
	ns.eventually(func() error {
		_, err := kubectl("get", "--raw", "/readyz")
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
	ns := begin(t)
	ns.target("away", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.watcher("pod")
	uid := ns.uid("pod")
	mount, file := ns.wantOneMount(uid), volumeDir(uid, "volume")+"/address"

	node.apiServer.stop()
	changed := changeInEtcd("/registry/connectors.alauda.io/connectors/"+ns.name+"/target", "https://one.", "https://two.")
	time.Sleep(away) // what is tried
	kept, err := os.ReadFile(file)
	node.kubelet.stop()
	node.apiServer = node.restart(node.apiServer)
	ready := await(limit, func() error {
		_, err := kubectl("get", "--raw", "/readyz")
		return err
	})
	returned := time.Now()
	arrived := await(limit, func() error {
		address, err := os.ReadFile(file)
		if err == nil && string(address) != "https://two.example.com" {
			err = fmt.Errorf("the address is %q", address)
		}
		return err
	})
	took := time.Since(returned)
	node.kubelet = node.restart(node.kubelet) // before anything can end the test: the others need it
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
	for line := range strings.Lines(readFile(t, node.kubelet.log)) {
		if strings.Contains(line, uid) && strings.Contains(line, "UnmountVolume.TearDown failed") {
			return nil
		}
	}
	return fmt.Errorf("kubelet has not tried to unmount the volume of Pod %s", uid)
}

func TestDriverIsListedOnlyWhileItServes(t *testing.T) {
	ns := begin(t)
	listed := func() string {
		return ns.kubectl("get", "csinode", nodeName, "--output=jsonpath={.spec.drivers[*].name}")
	}
	if drivers := listed(); drivers != "connectors-csi" {
		t.Errorf("the driver is ready, and CSINode lists %q", drivers)
	}
	for path, content := range sorted(map[string]string{
		"/healthz": "ok\n", "/readyz": "ok\n", "/metrics": "\nconnectors_csi_volumes ",
	}) {
		if page, err := httpGet(driverURL(t) + path); err != nil || !strings.Contains(page, content) {
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
		restarts := driverNamespace(t).kubectl("get", "pod", driverPods, "--output=jsonpath={.items[*].status.containerStatuses[0].restartCount}")
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

func TestSeveralConnectorsOfTwoClassesInOneVolume(t *testing.T) {
	ns := begin(t)
	other, closed := newNamespace(t), newNamespace(t)
	ns.apply(`
apiVersion: connectors.alauda.io/v1alpha1
kind: ConnectorClass
metadata: {name: registry}
spec:
  configurations:
  - name: config
    params:
    - {name: kind, default: mirror, enum: [mirror, publish]}
    - {name: scope}
    - {name: tags, type: array, default: [a, b]}
    data:
      registries: |
        {{ .configurations.kind }} of {{ .configurations.scope }}, tags {{ join "+" .configurations.tags }}
        {{- range .connectors }}
        {{ .namespace }}/{{ .name }} is {{ .spec.address }}
        {{- end }}
      both: registry
      unwanted: ""
`)
	ns.class("sources", configurations{"config": {
		"sources": "{{ range .connectors }}{{ .metadata.namespace }}/{{ .metadata.name }} {{ end }}with {{ .configurations.scope }}",
		"both":    "sources",
	}})
	ns.connector("first", "registry", "https://first.example.com")
	other.connector("second", "sources", "https://second.example.com")
	ns.connector("third", "registry", "https://third.example.com")
	closed.connector("closed", "sources", "https://closed.example.com")
	ns.allow("default", ns)
	other.allow("default", ns)

	connectors := fmt.Sprintf(`connectors: "first, %s/second, third"`, other.name)
	const params = `configuration.params: '{"config": {"scope": "acme"}}'`
	ns.pod("pod", `{`+connectors+`, configuration.names: "config,!unwanted", `+params+`}`)
	ns.pod("without-param", `{`+connectors+`, configuration.names: config}`)
	ns.pod("wrong-param", `{`+connectors+`, configuration.names: config, configuration.params: '{"config": {"scope": "acme", "kind": "all"}}'}`)
	ns.pod("nothing-to-exclude", `{`+connectors+`, configuration.names: "config,!unwnted", `+params+`}`)
	ns.pod("one-not-allowed", fmt.Sprintf(`{connectors: "first,%s/closed", configuration.names: config, %s}`, closed.name, params))

	ns.running("pod")
	ns.want("pod", "/volume/registries", "mirror of acme, tags a+b\n"+
		ns.name+"/first is https://first.example.com\n"+
		ns.name+"/third is https://third.example.com\n")
	ns.want("pod", "/volume/sources", other.name+"/second with acme")
	ns.want("pod", "/volume/both", "sources")
	ns.wantFiles("pod", "/volume", "both", "registries", "sources")
	ns.refused("without-param", "code = InvalidArgument", `required configuration param "scope" is missing`)
	ns.refused("wrong-param", "code = InvalidArgument", `configuration param "kind" must be one of [mirror publish], not "all"`)
	ns.refused("nothing-to-exclude", "code = InvalidArgument",
		`configuration.names excludes the file "unwnted", but the volume's files are: both, registries, sources, unwanted`)
	ns.refused("one-not-allowed", "code = PermissionDenied",
		fmt.Sprintf(`ServiceAccount %s/default may not read Connector "%s/closed"`, ns.name, closed.name))
}

// curl uses a forward proxy with nothing but the built-in files.
func TestBuiltInFilesLetCurlThroughTheProxy(t *testing.T) {
	ns := begin(t, "--builtin-files")
	other := newNamespace(t)
	ns.class("curl-one", configurations{"config": {"ca.crt": "of the class"}})
	ns.class("curl-two", nil)
	ns.connector("one", "curl-one", "http://one.example.com")
	other.connector("two", "curl-two", "http://two.example.com")
	proxy := forwardProxy(t, []string{ns.name + "/one", other.name + "/two"}, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "the proxy answers for %s", r.URL)
	})
	ns.proxy("connectorclass", "curl-two", proxy)
	ns.allow("default", ns)
	other.allow("default", ns)
	connectors := fmt.Sprintf(`connectors: "one,%s/two"`, other.name)
	ns.pod("pod", `{`+connectors+`, configuration.names: "!context.token"}`)
	ns.pod("with-class", `{`+connectors+`, configuration.names: "config"}`)
	ns.running("pod", "with-class")

	const request = "curl --silent --show-error --fail http://one.example.com/hello"
	for _, way := range []string{
		"set -a; . /volume/.env; set +a; " + request,
		request + " --config /volume/.curlrc",
		request + ` --proxy "$(cat /volume/http.proxy)"`,
		request + ` --proxy "$(cat /volume/https.proxy)"`,
	} {
		if output, err := ns.sh("pod", way); err != nil || output != "the proxy answers for http://one.example.com/hello" {
			t.Errorf("%s: %v: %s", way, err, output)
		}
	}
	if output, err := ns.sh("pod", request+" --proxy "+proxy); err == nil || !strings.Contains(output, "407") {
		t.Errorf("the proxy lets one in without a token: %v: %s", err, output)
	}

	ns.want("pod", "/volume/connector.status.proxyAddress", proxy)
	ns.wantFiles("pod", "/volume", ".curlrc", ".env", "connector.status.proxyAddress", "http.proxy", "https.proxy") // there is no CA
	ns.want("with-class", "/volume/ca.crt", "of the class")
	ns.wantTokenOf(ns.read("with-class", "/volume/context.token"), ns.name, "default", "with-class")
}

// documentedGitClasses are those of the product's documentation, by the release that has them first, and what
// git reads from their files. There TOKEN and COLON-TOKEN stand for the token in base64, the latter after a colon.
var documentedGitClasses = []struct{ release, template, config string }{
	{"1.0-ssl", `[http]
  sslVerify = false
`, `http.sslverify=false
`},
	{"1.0", `[http]
    extraHeader = Authorization: Basic {{ printf ":%s" .context.token | b64enc }}
[url "{{ .connector.status.proxyAddress }}"]
    insteadOf = {{.connector.spec.address}}
`, `http.extraheader=Authorization: Basic COLON-TOKEN
url.http://proxy.example.com.insteadof=https://one.example.com
`},
	{"1.6", `[http]
    extraHeader = Authorization: Basic {{ .context.token | b64enc }}
[url "{{ .connector.status.proxyAddress }}"]
    insteadOf = {{ .connector.spec.address }}
`, `http.extraheader=Authorization: Basic TOKEN
url.http://proxy.example.com.insteadof=https://one.example.com
`},
	{"1.9", `[http]
    extraHeader = Authorization: Basic {{ printf ":%s" .context.token | b64enc }}
{{- range .connectors }}
[url "{{ .status.proxyAddress }}"]
    insteadOf = {{.spec.address}}
{{- end }}
`, `http.extraheader=Authorization: Basic COLON-TOKEN
url.http://proxy.example.com.insteadof=https://one.example.com
`},
	{"1.4-params", `{{ $sslVerify := "true" -}}
{{- range .connector.spec.params }}{{- if eq .name "sslVerify" }}{{$sslVerify = .value }}{{ end }}{{- end }}
[http]
  sslVerify = {{ $sslVerify }}
`, `http.sslverify=true
`},
	{"1.12", `{{- range .connectors }}
[http "{{ .status.proxy.httpAddress.url }}"]
    extraHeader = Authorization: Basic {{ printf ":%s" $.context.token | b64enc }}
[url "{{ .status.proxy.httpAddress.url }}"]
    insteadOf = {{.spec.address}}
{{- end }}
`, `http.http://proxy.example.com.extraheader=Authorization: Basic COLON-TOKEN
url.http://proxy.example.com.insteadof=https://one.example.com
`},
}

func TestGitReadsTheDocumentedClasses(t *testing.T) {
	ns := begin(t)
	files := map[string]string{"token": "{{ .context.token }}"}
	for _, class := range documentedGitClasses {
		files[class.release] = class.template
	}
	ns.target("documented-git", files)
	ns.proxy("connector", "target", "http://proxy.example.com")
	ns.pod("pod", mountTarget)
	ns.running("pod")
	token := ns.read("pod", "/volume/token")
	encode := base64.StdEncoding.EncodeToString
	for _, class := range documentedGitClasses {
		want := strings.NewReplacer("COLON-TOKEN", encode([]byte(":"+token)), "TOKEN", encode([]byte(token))).Replace(class.config)
		if got := ns.kubectl("exec", "pod", "--", "git", "config", "--file", "/volume/"+class.release, "--list"); got != want {
			t.Errorf("release %s: git config --list says\n%s\nnot\n%s", class.release, got, want)
		}
	}
}

// The documented classes for yarn, and for JSON, which has a comma too many there for anything but YAML.
const documentedYarn = `
{{- $proxyURL := urlParse .connector.status.proxyAddress -}}
{{- $password := .context.token -}}
{{- $registryURL := urlParse .connector.spec.address -}}
{{- $username := printf "%s/%s" .connector.metadata.namespace .connector.metadata.name | urlquery -}}
npmRegistryServer: "{{ .connector.spec.address }}"
npmAuthIdent: "{{ printf "user:password" | b64enc }}"
unsafeHttpWhitelist:
- {{ $registryURL.hostname }}
httpProxy: "{{ $proxyURL.scheme }}://{{ $username }}:{{ $password }}@{{ $proxyURL.host }}"
httpsProxy: "{{ $proxyURL.scheme }}://{{ $username }}:{{ $password }}@{{ $proxyURL.host }}"
npmAlwaysAuth: true
enableStrictSsl: false
npmPublishRegistry: "{{ .connector.spec.address }}"
`

const documentedJSON = `{"connectors": [
{{- range .connectors }}
  {"name": "{{ .name }}", "address": "{{ .spec.address }}"},
{{- end }}
]}
`

func TestYAMLParsersReadTheDocumentedClasses(t *testing.T) {
	ns := begin(t)
	ns.target("documented-yaml", map[string]string{"token": "{{ .context.token }}", ".yarnrc.yml": documentedYarn, "settings.json": documentedJSON})
	ns.proxy("connector", "target", "http://proxy.example.com")
	ns.pod("pod", mountTarget)
	ns.running("pod")
	const address = "https://one.example.com"
	proxy := fmt.Sprintf("http://%s%%2Ftarget:%s@proxy.example.com", ns.name, ns.read("pod", "/volume/token"))
	for file, want := range sorted(map[string]map[string]any{
		".yarnrc.yml": {
			"npmRegistryServer": address, "npmPublishRegistry": address, "npmAuthIdent": "dXNlcjpwYXNzd29yZA==",
			"unsafeHttpWhitelist": []any{"one.example.com"}, "httpProxy": proxy, "httpsProxy": proxy,
			"npmAlwaysAuth": true, "enableStrictSsl": false,
		},
		"settings.json": {"connectors": []any{map[string]any{"name": "target", "address": address}}},
	}) {
		var got map[string]any
		if err := yaml.UnmarshalStrict([]byte(ns.read("pod", "/volume/"+file)), &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s is %v (%v), not %v", file, got, err, want)
		}
	}
}
