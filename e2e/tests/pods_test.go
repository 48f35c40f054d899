package tests

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/image"
	"connectors-csi/e2e/machine"
)

// Who may have which files, and what Pods see of them.

func TestConnectorInAnotherNamespace(t *testing.T) {
	ns := beside(t)
	other := newNamespace(t)
	ns.class("elsewhere", configurations{"config": {"address": "{{ .connector.spec.address }}"}})
	other.connector("open", "elsewhere", "https://open.example.com")
	other.connector("closed", "elsewhere", "https://closed.example.com")
	other.kubectl("create", "role", "open", "--verb=get", "--resource=connectors.connectors.alauda.io",
		"--resource-name=open")
	other.kubectl("create", "rolebinding", "open", "--role=open", "--serviceaccount="+ns.name+":default")

	ns.pod("allowed", fmt.Sprintf(`{connector.name: open, connector.namespace: %s, configuration.names: config}`,
		other.name))
	ns.running("allowed")
	ns.want("allowed", "/volume/address", "https://open.example.com")

	// Not allowed: the event says so, and the command that it names helps.
	ns.pod("refused", fmt.Sprintf(`{connector.name: closed, connector.namespace: %s, configuration.names: config}`,
		other.name))
	message := ns.refused("refused", "code = PermissionDenied",
		fmt.Sprintf(`ServiceAccount %s/default may not read Connector "%s/closed"`, ns.name, other.name))
	_, command, found := strings.Cut(strings.TrimSpace(message), "Allow it with: ")
	if !found {
		t.Fatalf("the event names no remedy: %s", message)
	}
	if err := machine.Run("bash", "-c", command); err != nil {
		t.Fatal(err)
	}
	ns.running("refused")
	ns.want("refused", "/volume/address", "https://closed.example.com")
}

func TestTokenIsThatOfThePod(t *testing.T) {
	ns := begin(t)
	ns.target("token", map[string]string{"token": "{{ .context.token }}"})
	const mountForAnHour = `{connector.name: target, configuration.names: config, token.expiration: 1h}`
	ns.kubectl("patch", "connectorclass", "token", "--type=merge", "--patch",
		`{"spec": {"proxy": {"audience": "the-proxy"}}}`)
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
	for pod, lifetime := range sorted(map[string]time.Duration{"default": 30 * time.Minute, "hour": time.Hour,
		"audience": 30 * time.Minute}) {
		token := ns.read(pod, "/volume/token")
		ns.wantTokenOf(token, ns.name, "default", pod)
		c := ns.claims(token)
		if got := c.Lifetime(); got != lifetime {
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
	ns := beside(t)
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

func TestNonRootPodsInARestrictedNamespace(t *testing.T) {
	ns := beside(t)
	ns.target("restricted", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.kubectl("label", "namespace", ns.name, "pod-security.kubernetes.io/enforce=restricted")
	if _, err := cluster.Kubectl("--namespace", ns.name, "run", "root", "--image=root", "--dry-run=server"); err == nil {
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
`, pod.name, pod.fsGroup, image.Client, mountTarget))
		ns.running(pod.name)
		ns.want(pod.name, "/volume/address", "https://one.example.com")
		modes, err := ns.sh(pod.name, "id -u; stat -Lc '%a %u %g' /volume/address /volume /volume/..data")
		if want := "1000\n" + pod.file + "\n" + pod.dir + "\n" + pod.dir; err != nil || modes != want {
			t.Errorf("Pod %s: user ID, then mode, owner and group of file and directories are %q (%v), not %q", pod.name, modes,
				err, want)
		}
	}
}

func TestEventsSayWhatIsWrong(t *testing.T) {
	ns := beside(t)
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
		manifest := cluster.PodManifest(c.pod, c.attributes)
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
	if output, err := clone("-c http." + proxy + ".extraHeader="); err == nil ||
		!strings.Contains(output, "could not read Username") {
		t.Errorf("the proxy lets one in without a token: %v: %s", err, output)
	}

	// A restarted kubelet has no tokens and asks for new ones.
	dir := cluster.VolumeDir(ns.uid("pod"), "volume")
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

func TestSubPathAndTwoVolumes(t *testing.T) {
	ns := beside(t, quickRefresh)
	ns.target("first", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.class("second", configurations{"config": {"text": "of the second volume"}})
	ns.connector("second", "second", "https://second.example.com")
	const mount = "mountPath: /volume}"
	manifest := cluster.PodManifest("pod", mountTarget,
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
	if output, err := ns.sh("pod", "echo mine > /etc/address"); err == nil ||
		!strings.Contains(output, "Read-only file system") {
		t.Errorf("the container can write through subPath: %v: %s", err, output)
	}
	uid := ns.uid("pod")
	ns.deletePod("pod")
	ns.gone(uid)
}

// In a Pod with a user namespace of its own, the IDs of the container are others on the node. Kubelet has the
// volume mounted so that the container sees the owners as they are.
func TestPodsInAUserNamespaceOfTheirOwn(t *testing.T) {
	if release := os.Getenv(cluster.EnvRelease); release != "" && release < "1.33" {
		t.Skip("before 1.33 the feature gate UserNamespacesSupport is off, and hostUsers has no effect")
	}
	ns := beside(t, quickRefresh)
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
			t.Errorf("Pod %s: user ID, then mode, owner and group of file and directory are %q (%v), not %q", pod.name, seen,
				err, pod.stat)
		}
		if of, err := ns.sh(pod.name, "cat /proc/self/uid_map"); err != nil ||
			slices.Equal(strings.Fields(of)[:2], []string{"0", "0"}) {
			t.Errorf("Pod %s has the node's users: %v: %s", pod.name, err, of)
		}
		if mount, err := ns.sh(pod.name, "grep ' /volume ' /proc/self/mountinfo"); err != nil ||
			!strings.Contains(mount, "idmapped") {
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
