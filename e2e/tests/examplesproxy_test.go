package tests

import (
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/image"
	"connectors-csi/e2e/node"
)

// examples/proxy: nginx, as a platform engineer applies it, with the real API server and targets behind TLS. Attacks
// on it and loads are in files of their own.

// standardProxy is examples/proxy, with all its Connectors, in a namespace of its own.
type standardProxy struct {
	namespace
	target *recordingTarget
	pods   []string          // their IPs
	tokens map[string]string // of ServiceAccounts
	seen   *[]string         // every token that a test has used, to look for in the logs
}

// TestStandardProxy has one deployment for all its parts.
func TestStandardProxy(t *testing.T) {
	p := deployStandardProxy(t)
	for _, part := range []struct {
		name string
		test func(standardProxy)
		asks bool // so often that the next part would find the limit of questions reached
	}{
		{"rights", standardProxy.hasNoRight, false},
		{"tokens", standardProxy.admitsTokens, true},
		{"malformed tokens", standardProxy.refusesMalformedTokens, true},
		{"two Connectors", standardProxy.keepsConnectorsApart, false},
		{"cache", standardProxy.asksOnce, true},
		{"headers", standardProxy.passesListedHeaders, false},
		{"paths", standardProxy.passesListedPaths, false},
		{"answers of the target", standardProxy.changesAnswers, false},
		{"smuggling", standardProxy.refusesSmuggling, true},
		{"TLS to the target", standardProxy.verifiesTargets, false},
		{"streams", standardProxy.streams, false},
		{"clients", standardProxy.servesClients, false},
		{"API server absent", standardProxy.saysThatItCannotAsk, true},
		{"flood", standardProxy.withstandsWrongTokens, true},
		{"logs", standardProxy.logsNoSecret, false}, // before other Pods have theirs
		{"changes under load", standardProxy.changesUnderLoad, false},
		{"clones at once", standardProxy.carriesClones, false},
		{"npm install", standardProxy.carriesPackages, false},
		{"logs", standardProxy.logsNoSecret, false},
		{"fetch only", standardProxy.refusesPushes, false},
		{"TLS to clients", standardProxy.servesTLS, false},
		{"TLS to the API server", standardProxy.verifiesAPIServer, false},
	} {
		t.Run(part.name, func(t *testing.T) {
			p := p
			p.T = t
			p.pods = p.awaitPods()
			part.test(p)
			if part.asks {
				time.Sleep(askAgain)
			}
		})
	}
}

// askAgain is the time after which what has come before is no part of the limit of questions: they are ten a second, of
// which twenty may be at once.
const askAgain = 2 * time.Second

// awaitPods waits until the proxy's Pods are two, and returns their addresses.
func (p standardProxy) awaitPods() (ips []string) {
	p.Helper()
	p.eventually(func() error {
		if ips = p.podIPs(); len(ips) != 2 {
			return fmt.Errorf("two Pods are expected, there are %q", ips)
		}
		return nil
	})
	return ips
}

// deployStandardProxy applies a copy of examples/proxy in which only the namespace is another one, the component
// "more" is taken, and two Connectors are added whose targets are impostors.
func deployStandardProxy(t *testing.T) standardProxy {
	t.Helper()
	p := standardProxy{namespace: measured(t, "--builtin-files"), target: newRecordingTarget(t),
		tokens: map[string]string{}, seen: new([]string)}
	dir := p.copyExample("more", "test")
	if err := os.Mkdir(dir+"/test", 0o755); err != nil {
		t.Fatal(err)
	}
	component := `
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
resources: [connectors.yaml]
configMapGenerator:
- name: connectors-proxy
  behavior: merge
  files: [connector-untrusted.conf, connector-misnamed.conf]
  literals:
  - untrusted.address=https://untrusted.example.com
  - misnamed.address=https://misnamed.example.com
`
	connectors := ""
	server := readFile(t, dir+"/more/connector-curl.conf")
	for name, port := range map[string]string{"untrusted": "8090", "misnamed": "8091"} {
		own := strings.NewReplacer("$connector curl", "$connector "+name, "listen 8084", "listen "+port).Replace(server)
		writeFile(t, dir+"/test/connector-"+name+".conf", own)
		connectors += fmt.Sprintf(`
apiVersion: connectors.alauda.io/v1alpha1
kind: Connector
metadata: {name: %s}
spec: {connectorClassName: curl-reverse-proxy, address: "https://%s.example.com"}
---`, name, name)
	}
	writeFile(t, dir+"/test/kustomization.yaml", component)
	writeFile(t, dir+"/test/connectors.yaml", connectors)
	p.kubectl("apply", "--validate=strict", "-k", dir)
	t.Cleanup(func() { cluster.Kubectl("delete", "-k", dir, "--wait=false") })

	p.apply(`
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: git}
rules: [{apiGroups: [connectors.alauda.io], resources: [connectors], resourceNames: [git], verbs: [get, watch]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: npm}
rules: [{apiGroups: [connectors.alauda.io], resources: [connectors], resourceNames: [npm], verbs: [get, watch]}]
`)
	for _, account := range []string{"git-user", "npm-user", "viewer", "nobody"} {
		p.kubectl("create", "serviceaccount", account)
	}
	p.kubectl("create", "rolebinding", "git-user", "--role=git", "--serviceaccount="+p.name+":git-user")
	p.kubectl("create", "rolebinding", "npm-user", "--role=npm", "--serviceaccount="+p.name+":npm-user")
	p.allow("viewer", p.namespace)
	p.allow("default", p.namespace)
	for _, account := range []string{"git-user", "npm-user", "viewer", "nobody"} {
		p.tokens[account] = p.token(account)
	}
	p.rolledOut()
	return p
}

// copyExample returns a copy of examples/proxy for the test's namespace, with components.
func (p standardProxy) copyExample(components ...string) string {
	p.Helper()
	dir := p.TempDir()
	if err := os.CopyFS(dir, os.DirFS("../examples/proxy")); err != nil {
		p.Fatal(err)
	}
	kustomization := strings.Replace(readFile(p.T, dir+"/kustomization.yaml"), "namespace: default",
		"namespace: "+p.name, 1)
	writeFile(p.T, dir+"/kustomization.yaml", kustomization+"components: ["+strings.Join(components, ", ")+"]\n")
	return dir
}

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (p standardProxy) rolledOut() {
	p.Helper()
	p.kubectl("rollout", "status", "deployment/connectors-proxy", "--timeout=3m")
}

const proxyPods = "--selector=app.kubernetes.io/name=connectors-proxy"

func (p standardProxy) podIPs() []string {
	p.Helper()
	return strings.Fields(p.kubectl("get", "pods", proxyPods, "--field-selector=status.phase=Running",
		"--output=jsonpath={.items[*].status.podIP}"))
}

// hasNoRight looks for a token in the proxy's Pods, and for what their ServiceAccount may do beyond what every other may.
func (p standardProxy) hasNoRight() {
	const of = "--output=jsonpath={.items[*].spec.serviceAccountName} {.items[*].spec.volumes[*].projected}"
	if got := strings.Fields(p.kubectl("get", "pods", proxyPods, of)); len(got) != 2 || got[0] != "default" || got[1] != "default" {
		p.Errorf("the Pods' ServiceAccounts and projected volumes are %q", got)
	}
	other := newNamespace(p.T)
	other.connector("git", "git", "https://one.example.com")
	for _, in := range []namespace{other, {p.T, "kube-system"}} {
		for _, right := range []string{"get connectors.connectors.alauda.io", "get secrets", "create serviceaccounts/token", "create tokenreviews"} {
			answer, err := cluster.Kubectl(append([]string{"auth", "can-i", "--namespace=" + in.name, "--as=system:serviceaccount:" + p.name + ":default"},
				strings.Fields(right)...)...)
			if err == nil || strings.TrimSpace(answer) != "no" {
				p.Errorf("%s in %s: %s", right, in.name, answer)
			}
		}
	}
}

func (p standardProxy) admitsTokens() {
	good := p.tokens["git-user"]
	for what, header := range sorted(map[string]string{
		"Bearer": bearer(good), "Basic": basic("", good), "Basic with a user": basic("anybody", good),
		"lower case": "authorization: bearer " + good, "two spaces": "Authorization:  Basic  " + basic("u",
			good)[len("Authorization: Basic "):],
	}) {
		if got := p.get(gitPort, fetchPath, header); got.status != 200 || got.body != "the target's answer" {
			p.Errorf("%s: %d %s", what, got.status, got.body)
		}
	}

	p.kubectl("delete", "connector", "pip")
	bound := p.token("viewer", "--bound-object-kind=Pod", "--bound-object-name=viewer",
		"--bound-object-uid="+p.boundPod("viewer"))
	if got := p.get(gitPort, fetchPath, bearer(bound)); got.status != 200 {
		p.Errorf("a Pod's token: %d %s", got.status, got.body)
	}
	p.kubectl("delete", "pod", "viewer", "--grace-period=1", "--timeout=1m")
	deleted := time.Now()
	resigned := p.signed(good, func(map[string]any) {})
	if got := p.get(gitPort, fetchPath, bearer(resigned)); got.status != 200 {
		p.Errorf("the test's signature: %d %s", got.status, got.body)
	}
	expired := p.signed(good, func(claims map[string]any) {
		claims["iat"], claims["nbf"] = time.Now().Unix()-7200, time.Now().Unix()-7200
		claims["exp"] = time.Now().Unix() - 3600
	})
	parts := strings.Split(good, ".")
	for what, token := range sorted(map[string]string{
		"another audience": p.token("git-user", "--audience=somebody-else"),
		"expired":          expired,
		"not signed":       parts[0] + "." + parts[1] + ".",
		"another's claims": parts[0] + "." + strings.Split(p.tokens["nobody"], ".")[1] + "." + parts[2],
		"no token":         "wrong",
	}) {
		p.wantChallenge(what, p.get(gitPort, fetchPath, bearer(token)))
	}
	p.wantChallenge("none", p.get(gitPort, fetchPath))
	// The API server remembers a token for ten seconds, and the proxy what the API server said for another ten.
	p.eventually(func() error {
		if got := p.get(gitPort, fetchPath, bearer(bound)); got.status != 401 {
			return fmt.Errorf("the token of a deleted Pod: %d %s", got.status, got.body)
		}
		return nil
	})
	took := time.Since(deleted)
	p.Logf("refused %v after the token's Pod had gone", took.Round(10*time.Millisecond))
	if took > 22*time.Second {
		p.Errorf("refused after %v only", took)
	}
	for what, c := range sorted(map[string]struct{ port, token string }{
		"may read nothing":              {gitPort, p.tokens["nobody"]},
		"may read another":              {gitPort, p.tokens["npm-user"]},
		"a Connector that has gone":     {"8083", p.tokens["viewer"]},
		"gone, and no right to read it": {"8083", p.tokens["git-user"]},
	}) {
		got := p.get(c.port, "/simple/", bearer(c.token))
		if c.port == gitPort {
			got = p.get(c.port, fetchPath, bearer(c.token))
		}
		if got.status != 403 || !strings.Contains(got.body, "may not read it") || got.header.Get("WWW-Authenticate") != "" {
			p.Errorf("%s: %d, %v, %q", what, got.status, got.header, got.body)
		}
	}
	p.connector("pip", "pip-reverse-proxy", "https://pip.example.com")
	for _, volume := range strings.Fields(p.kubectl("get", "pods", proxyPods,
		"--output=jsonpath={.items[*].spec.volumes[*].name}")) {
		if strings.HasPrefix(volume, "kube-api-access") {
			p.Error("the proxy has a ServiceAccount's token")
		}
	}
}

// boundPod makes a Pod of a ServiceAccount and returns its uid.
func (p standardProxy) boundPod(account string) string {
	p.Helper()
	p.kubectl("run", account, "--image="+image.Client, "--overrides="+fmt.Sprintf(
		`{"spec": {"serviceAccountName": %q, "terminationGracePeriodSeconds": 1}}`, account), "--command", "--", "sleep",
		"infinity")
	return p.uid(account)
}

// keepsConnectorsApart asks both Connectors of one Pod with tokens that one of them admits, before and after its answer
// is cached.
func (p standardProxy) keepsConnectorsApart() {
	token := p.token("git-user")
	for range 3 {
		if got := p.get(npmPort, "/package", bearer(token)); got.status != 403 {
			p.Errorf("git's token at npm: %d %s", got.status, got.body)
		}
		if got := p.get(gitPort, fetchPath, bearer(token)); got.status != 200 {
			p.Errorf("git's token at git: %d %s", got.status, got.body)
		}
	}
	if got := p.get(npmPort, "/package", bearer(token), "Host: "+p.host("git")); got.status != 400 && got.status != 403 {
		p.Errorf("git's token at npm with git's name: %d %s", got.status, got.body)
	}
	if got := p.send(p.pods[0]+":"+npmPort,
		"GET /package HTTP/1.1\r\nHost: "+p.host("git")+"\r\n"+bearer(token)+"\r\n\r\n"); got.status != 403 {
		p.Errorf("git's token at npm with git's name alone: %d %s", got.status, got.body)
	}
}

// asksOnce counts what the API server is asked.
func (p standardProxy) asksOnce() {
	token := p.token("git-user")
	before := p.asked()
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if got := p.get(gitPort, fetchPath, bearer(token)); got.status != 200 {
				p.Errorf("%d %s", got.status, got.body)
			}
		})
	}
	all.Wait()
	if got := p.asked().since(before); got.connectors < 1 || got.connectors > 3 { // the driver may ask too
		p.Errorf("50 requests at once made %+v", got)
	}

	// A refusal is not kept.
	before = p.asked()
	for range 3 {
		p.get(gitPort, fetchPath, bearer("wrong"))
	}
	if got := p.asked().since(before); got.unknown < 3 {
		p.Errorf("3 requests with a wrong token made %+v", got)
	}
	late := p.token("nobody")
	if got := p.get(gitPort, fetchPath, bearer(late)); got.status != 403 {
		p.Errorf("without a RoleBinding: %d", got.status)
	}
	p.kubectl("create", "rolebinding", "late", "--role=git", "--serviceaccount="+p.name+":nobody")
	began := time.Now()
	p.eventually(func() error {
		if got := p.get(gitPort, fetchPath, bearer(late)); got.status != 200 {
			return fmt.Errorf("with a RoleBinding: %d", got.status)
		}
		return nil
	})
	p.Logf("admitted %v after the RoleBinding", time.Since(began).Round(10*time.Millisecond))
	p.kubectl("delete", "rolebinding", "late")
	began = time.Now()
	p.eventually(func() error {
		if got := p.get(gitPort, fetchPath, bearer(late)); got.status != 403 {
			return fmt.Errorf("after the RoleBinding: %d", got.status)
		}
		return nil
	})
	took := time.Since(began)
	p.Logf("refused %v after the RoleBinding had gone", took.Round(10*time.Millisecond))
	if took > 12*time.Second {
		p.Errorf("refused after %v only", took)
	}
}

// proxiedClients are those of the component "more", whose classes are for a reverse proxy.
var proxiedClients = []client{
	{
		name: "npm",
		script: `unset PROXY # npm would take it for a forward proxy's
			npm install --userconfig "$VOLUME/.npmrc" greeting && node --print 'require("greeting")'`,
		prints: "hello from npm", refused: "E401",
	},
	{
		name: "pip",
		script: `PIP_CONFIG_FILE="$VOLUME/pip.conf" pip3 install -vv --no-deps --target . greeting &&
			python3 -c 'import greeting; print(greeting.text)'`,
		prints: "hello from pip", refused: "401",
	},
	{
		name:   "curl",
		script: `curl --silent --show-error --fail --config "$VOLUME/.curlrc" "http://$PROXY/greeting"`,
		prints: "hello from curl", refused: "401",
	},
	{
		name:   "registry",
		script: `skopeo inspect --tls-verify=false --authfile "$VOLUME/config.json" --config "docker://$PROXY/greeting:1"`,
		prints: "hello-from-a-registry", refused: "unauthorized",
	},
}

// servesClients runs the clients with the files of their volumes, and without the token.
func (p standardProxy) servesClients() {
	// A registry's blobs may be elsewhere: there the client goes by itself.
	const blob = "https://blobs.example.com/x?signature=1"
	theNode.Targets.Serve("registry.example.com", http.RedirectHandler(blob, http.StatusTemporaryRedirect))
	if got := p.get("8085", "/v2/x/blobs/y", bearer(p.tokens["viewer"])); got.status != 307 ||
		got.header.Get("Location") != blob {
		p.Errorf("a redirect of the registry: %d, %v", got.status, got.header)
	}
	theNode.Targets.Serve("npm.example.com", withToken("change-me", npmRegistry(p.T)))
	theNode.Targets.Serve("pip.example.com", node.WithPassword("bot", "change-me", pythonIndex(p.T)))
	theNode.Targets.Serve("curl.example.com", node.WithPassword("bot", "change-me",
		serve(map[string]string{"greeting": "hello from curl"})))
	theNode.Targets.Serve("registry.example.com", node.WithPassword("bot", "change-me", containerRegistry(p.T)))
	configuration := map[string]string{"npm": "npmrc", "pip": "pipconf", "curl": "curlrc", "registry": "registry-config"}
	for _, c := range proxiedClients {
		p.pod(c.name, fmt.Sprintf("{connector.name: %s, configuration.names: %s}", c.name, configuration[c.name]))
	}
	for _, c := range proxiedClients {
		p.running(c.name)
		volume := cluster.VolumeDir(p.uid(c.name), "volume")
		token := readFile(p.T, volume+"/context.token")
		*p.seen = append(*p.seen, token)
		if output, err := c.run(p.T, c.copy(p.T, volume, token, token), p.host(c.name)); err != nil ||
			!strings.Contains(output, c.prints) {
			p.Errorf("%s with the token: %v:\n%s", c.name, err, output)
		}
		if output, err := c.run(p.T, c.copy(p.T, volume, token, "none"), p.host(c.name)); err == nil ||
			!strings.Contains(output, c.refused) {
			p.Errorf("%s without the token: %v:\n%s", c.name, err, output)
		}
	}
}

// refusesPushes rolls the component "read-only" out.
func (p standardProxy) refusesPushes() {
	p.kubectl("apply", "-k", p.copyExample("more", "read-only"))
	p.rolledOut()
	p.pods = p.awaitPods()
	p.target.taken()
	for request, want := range sorted(map[string]int{
		"GET /x.git/info/refs?service=git-upload-pack": 200, "POST /x.git/git-upload-pack": 200,
		"GET /x.git/info/refs?service=git-receive-pack": 403, "POST /x.git/git-receive-pack": 403,
		"POST /x.git/git-upload-pack/../git-receive-pack": 403, "GET /x.git/info/refs?service=git-upload-pack&service=git-receive-pack": 403,
	}) {
		method, path, _ := strings.Cut(request, " ")
		got := p.ask(gitPort, method, path, bearer(p.tokens["git-user"]), "Content-Length: 0")
		if taken := p.target.taken(); got.status != want || (len(taken) == 1) != (want == 200) {
			p.Errorf("%s: %d %s, and %d requests reached the target", request, got.status, got.body, len(taken))
		}
	}
}

// servesTLS rolls the component "tls" out, with a certificate of the targets' authority, and clones in a Pod.
func (p standardProxy) servesTLS() {
	certificate, key, err := theNode.Targets.Renew(p.host("git"))
	if err != nil {
		p.Fatal(err)
	}
	dir := p.copyExample("more", "tls")
	writeFile(p.T, dir+"/tls.crt", certificate)
	writeFile(p.T, dir+"/tls.key", key)
	p.kubectl("create", "secret", "tls", "connectors-proxy-tls", "--cert="+dir+"/tls.crt", "--key="+dir+"/tls.key")
	class, _, _ := strings.Cut(readFile(p.T, dir+"/tls/class.yaml"), "        -----BEGIN")
	authority := strings.TrimSpace(readFile(p.T, theNode.Path(node.TargetCA)))
	writeFile(p.T, dir+"/tls/class.yaml", class+"        "+strings.ReplaceAll(authority, "\n", "\n        ")+"\n")
	p.kubectl("apply", "-k", dir)
	p.rolledOut()
	p.pods = p.awaitPods() // until the last one of before, which speaks no TLS, is gone from the Service
	p.apply(strings.Replace(cluster.PodManifest("tls", `{connector.name: git, configuration.names: config}`), "/volume",
		"/etc/git", 1))
	p.running("tls")
	clone := "export GIT_CONFIG_GLOBAL=/etc/git/.gitconfig; cd /tmp && rm -rf app && " +
		"git %s clone --quiet --depth=1 https://git.example.com/team/app.git && cat app/greeting"
	if output, err := p.sh("tls", fmt.Sprintf(clone, "")); err != nil || output != "hello" {
		p.Errorf("git clone: %v: %s", err, output)
	}
	// A renewed certificate needs no restart.
	serial := func() string {
		conn, err := tls.Dial("tcp", p.pods[0]+":"+gitPort, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			p.Fatal(err)
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	first := serial()
	if certificate, key, err = theNode.Targets.Renew(p.host("git")); err != nil {
		p.Fatal(err)
	}
	encode := base64.StdEncoding.EncodeToString
	p.kubectl("patch", "secret", "connectors-proxy-tls", "--patch",
		fmt.Sprintf(`{"data": {"tls.crt": %q, "tls.key": %q}}`, encode([]byte(certificate)), encode([]byte(key))))
	p.eventually(func() error {
		if serial() == first {
			return errors.New("the proxy still has the certificate of before")
		}
		return nil
	})
	if output, err := p.sh("tls", fmt.Sprintf(clone,
		"-c http.https://"+p.host("git")+".sslCAInfo=/dev/null")); err == nil {
		p.Errorf("git clones without the authority's certificate: %s", output)
	}
}

// verifiesAPIServer gives the proxy another authority than the API server's: no token may go to what it cannot trust.
func (p standardProxy) verifiesAPIServer() {
	p.kubectl("create", "configmap", "wrong", "--from-file=ca.crt="+theNode.Path(node.TargetCA))
	p.kubectl("patch", "deployment", "connectors-proxy", "--patch",
		`{"spec": {"template": {"spec": {"volumes": [{"name": "kubernetes", "configMap": {"name": "wrong"}}]}}}}`)
	p.rolledOut()
	p.pods = p.awaitPods()
	before := p.asked()
	got := p.get(npmPort, "/package", bearer(p.tokens["npm-user"]))
	if got.status != 503 || !strings.Contains(got.body, "cannot be asked") {
		p.Errorf("%d %s", got.status, got.body)
	}
	if asked := p.asked().since(before); asked.unknown > 0 {
		p.Errorf("the API server was asked: %+v", asked)
	}
}

// logsNoSecret looks for all tokens and for the credential in what the proxy has logged.
func (p standardProxy) logsNoSecret() {
	logs := p.kubectl("logs", proxyPods, "--tail=-1", "--prefix")
	if !strings.Contains(logs, ` "GET /`) {
		p.Errorf("the log has no line of a request:\n%.2000s", logs)
	}
	for _, secret := range slices.Concat(*p.seen, []string{"change-me", basic("bot",
		"change-me")[len("Authorization: Basic "):]}) {
		if strings.Contains(logs, secret) {
			p.Errorf("a secret is in the log: %.20s…", secret)
		}
		for part := range strings.SplitSeq(secret, ".") {
			if len(part) > 100 && strings.Contains(logs, part[:50]) {
				p.Errorf("a part of a token is in the log: %.20s…", part)
			}
		}
	}
}
