package main

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
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
	}{
		{"tokens", standardProxy.admitsTokens},
		{"malformed tokens", standardProxy.refusesMalformedTokens},
		{"two Connectors", standardProxy.keepsConnectorsApart},
		{"cache", standardProxy.asksOnce},
		{"headers", standardProxy.passesListedHeaders},
		{"paths", standardProxy.passesListedPaths},
		{"answers of the target", standardProxy.changesAnswers},
		{"smuggling", standardProxy.refusesSmuggling},
		{"TLS to the target", standardProxy.verifiesTargets},
		{"streams", standardProxy.streams},
		{"clients", standardProxy.servesClients},
		{"API server absent", standardProxy.saysThatItCannotAsk},
		{"flood", standardProxy.withstandsWrongTokens},
		{"logs", standardProxy.logsNoSecret}, // before other Pods have theirs
		{"changes under load", standardProxy.changesUnderLoad},
		{"clones at once", standardProxy.carriesClones},
		{"npm install", standardProxy.carriesPackages},
		{"logs", standardProxy.logsNoSecret},
		{"TLS to clients", standardProxy.servesTLS},
		{"TLS to the API server", standardProxy.verifiesAPIServer},
	} {
		t.Run(part.name, func(t *testing.T) {
			p := p
			p.T = t
			p.settle()
			p.pods = p.podIPs()
			part.test(p)
		})
	}
}

// settle waits until the proxy's Pods are two, and until what has come before is no part of the limit of questions.
func (p standardProxy) settle() {
	p.Helper()
	p.eventually(func() error {
		if pods := p.podIPs(); len(pods) != 2 {
			return fmt.Errorf("two Pods are expected, there are %q", pods)
		}
		return nil
	})
	time.Sleep(2 * time.Second) // ten questions a second, of which twenty may be at once
}

// deployStandardProxy applies a copy of examples/proxy in which only the namespace is another one, the component
// "more" is taken, and two Connectors are added whose targets are impostors.
func deployStandardProxy(t *testing.T) standardProxy {
	t.Helper()
	p := standardProxy{namespace: begin(t, "--builtin-files"), target: newRecordingTarget(t),
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
	t.Cleanup(func() { kubectl("delete", "-k", dir, "--wait=false") })

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

// The ports of the Connectors' servers in a Pod.
const (
	gitPort = "8080"
	npmPort = "8082"
)

// host is the name of a Connector's Service.
func (p standardProxy) host(connector string) string {
	return "c-" + connector + "." + p.name + ".svc.cluster.local"
}

// token returns a new token of a ServiceAccount.
func (p standardProxy) token(account string, options ...string) string {
	p.Helper()
	token := p.kubectl(append([]string{"create", "token", account}, options...)...)
	token = strings.TrimSpace(token)
	*p.seen = append(*p.seen, token)
	return token
}

// signed returns a token like another one but for what change does to its claims, signed with the API server's key.
func (p standardProxy) signed(token string, change func(claims map[string]any)) string {
	p.Helper()
	parts := strings.Split(token, ".")
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		p.Fatal(err)
	}
	var claims map[string]any
	if err := json.Unmarshal(payload, &claims); err != nil {
		p.Fatal(err)
	}
	change(claims)
	if payload, err = json.Marshal(claims); err != nil {
		p.Fatal(err)
	}
	block, _ := pem.Decode([]byte(readFile(p.T, node.path("service-account.key"))))
	key, err := x509.ParseECPrivateKey(block.Bytes)
	if err != nil {
		p.Fatal(err)
	}
	text := parts[0] + "." + base64.RawURLEncoding.EncodeToString(payload)
	digest := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		p.Fatal(err)
	}
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return text + "." + base64.RawURLEncoding.EncodeToString(signature)
}

// recordingTarget is the server of git.example.com and npm.example.com: it remembers what reaches it.
type recordingTarget struct {
	mu       sync.Mutex
	requests []*http.Request // without their bodies
	handlers map[string]http.Handler
}

func newRecordingTarget(t *testing.T) *recordingTarget {
	t.Helper()
	backend, err := gitBackend(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	target := &recordingTarget{handlers: map[string]http.Handler{"/team/": withPassword("bot", "change-me", backend)}}
	before := node.targets.handlers["git.example.com"]
	for _, name := range []string{"git", "npm", "untrusted", "misnamed"} {
		node.targets.serve(name+".example.com", target)
	}
	t.Cleanup(func() { node.targets.serve("git.example.com", before) })
	return target
}

// handle makes a handler that of the paths which begin so.
func (r *recordingTarget) handle(prefix string, handler http.HandlerFunc) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.handlers[prefix] = handler
}

func (r *recordingTarget) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	r.mu.Lock()
	r.requests = append(r.requests, request.Clone(request.Context()))
	var handler http.Handler
	for prefix, h := range r.handlers {
		if strings.HasPrefix(request.URL.Path, prefix) {
			handler = h
		}
	}
	r.mu.Unlock()
	if handler != nil {
		handler.ServeHTTP(w, request)
		return
	}
	io.Copy(io.Discard, request.Body)
	w.Header().Set("Set-Cookie", "session=1")
	fmt.Fprint(w, "the target's answer")
}

// taken returns what has reached the target since the last call.
func (r *recordingTarget) taken() []*http.Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	taken := r.requests
	r.requests = nil
	return taken
}

// answer is what came back, with its body.
type answer struct {
	status int
	header http.Header
	body   string
}

// send writes a request as it is to a server of the proxy and reads the first answer. No answer is status 0.
func (p standardProxy) send(address, request string) answer {
	p.Helper()
	conn, err := net.DialTimeout("tcp", address, 10*time.Second)
	if err != nil {
		p.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(conn, request) // the other side may close early
	reader := bufio.NewReader(conn)
	response, err := http.ReadResponse(reader, nil)
	for err == nil && response.StatusCode == http.StatusContinue {
		response, err = http.ReadResponse(reader, nil)
	}
	if err != nil {
		return answer{}
	}
	body, _ := io.ReadAll(response.Body)
	return answer{response.StatusCode, response.Header, string(body)}
}

// get asks the proxy's first Pod for a path, with headers.
func (p standardProxy) get(port, path string, headers ...string) answer {
	p.Helper()
	return p.ask(port, "GET", path, headers...)
}

func (p standardProxy) ask(port, method, path string, headers ...string) answer {
	p.Helper()
	request := method + " " + path + " HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n"
	for _, header := range headers {
		request += header + "\r\n"
	}
	return p.send(p.pods[0]+":"+port, request+"\r\n")
}

func bearer(token string) string { return "Authorization: Bearer " + token }

func basic(user, password string) string {
	return "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

const fetchPath = "/x.git/info/refs?service=git-upload-pack"

// asked is what the API server was asked: for Connectors by those whom it knows, and by those whom it doesn't.
type asked struct{ connectors, unknown int }

var (
	getConnector = regexp.MustCompile(`(?m)^apiserver_request_total\{.*resource="connectors".*verb="GET".*\} (\d+)$`)
	wrongToken   = regexp.MustCompile(`(?m)^authentication_attempts\{result="(?:error|failure)"\} (\d+)$`)
)

func (p standardProxy) asked() asked {
	p.Helper()
	metrics := p.kubectl("get", "--raw", "/metrics")
	sum := func(of *regexp.Regexp) (total int) {
		for _, match := range of.FindAllStringSubmatch(metrics, -1) {
			count, err := strconv.Atoi(match[1])
			if err != nil {
				p.Fatal(err)
			}
			total += count
		}
		return total
	}
	return asked{sum(getConnector), sum(wrongToken)}
}

func (a asked) since(before asked) asked {
	return asked{a.connectors - before.connectors, a.unknown - before.unknown}
}

// wantChallenge checks that an answer asks for a token.
func (p standardProxy) wantChallenge(what string, got answer) {
	p.Helper()
	if got.status != 401 || got.header.Get("WWW-Authenticate") != `Basic realm="connectors"` {
		p.Errorf("%s: %d, %v, %q", what, got.status, got.header, got.body)
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
	p.kubectl("run", account, "--image="+clientImage, "--overrides="+fmt.Sprintf(
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

// passesListedHeaders compares what reaches the target with the list.
func (p standardProxy) passesListedHeaders() {
	p.target.taken()
	got := p.ask(gitPort, "POST", "/x.git/git-upload-pack", bearer(p.tokens["git-user"]), "Content-Length: 0",
		"Accept: a/b", "Accept-Encoding: gzip", "Content-Type: application/x-git-upload-pack-request",
		"Git-Protocol: version=2",
		"User-Agent: git/2", "Range: bytes=0-1", "If-None-Match: x",
		"Cookie: c=1", "Proxy-Authorization: Basic eDp5", "Private-Token: mine", "Job-Token: mine",
		"X-HTTP-Method-Override: DELETE",
		"X-Forwarded-For: 1.2.3.4", "X-Forwarded-User: admin", "X-Real-IP: 1.2.3.4", "Forwarded: for=1.2.3.4",
		"X-Api-Key: mine",
		"Authorization2: x", "X-Authorization: x", "X-Original-URL: /api", "X-Rewrite-URL: /api", "Sudo: root",
		"Upgrade: h2c",
		"Via: me", "Referer: http://x/?token=1", "X-Client: 9.9.9.9", "X-Refused: 200", "TE: trailers",
		"Expect: 100-continue")
	if got.status != 200 {
		p.Fatalf("%d %s", got.status, got.body)
	}
	taken := p.target.taken()
	if len(taken) != 1 {
		p.Fatalf("%d requests reached the target", len(taken))
	}
	want := map[string][]string{
		"Authorization": {basic("bot", "change-me")[len("Authorization: "):]},
		"Accept":        {"a/b"}, "Accept-Encoding": {"gzip"}, "Content-Type": {"application/x-git-upload-pack-request"},
		"Git-Protocol": {"version=2"}, "User-Agent": {"git/2"}, "Range": {"bytes=0-1"}, "If-None-Match": {"x"},
		"Content-Length": {"0"},
	}
	have := taken[0].Header.Clone()
	delete(have, "Connection")
	if !maps.EqualFunc(have, http.Header(want), slices.Equal) || taken[0].Host != "git.example.com" {
		p.Errorf("the target got %v for %s\nwant %v", have, taken[0].Host, want)
	}
	if got.header.Get("Set-Cookie") != "" || got.header.Get("Server") != "nginx" {
		p.Errorf("the answer's headers are %v", got.header)
	}

	// A header that nginx or the target could take for the proxy's own.
	for _, headers := range [][]string{
		{bearer(p.tokens["git-user"]), "Authorization: Basic eDp5"},
		{"Authorization: Basic eDp5", bearer(p.tokens["git-user"])},
		{bearer(p.tokens["git-user"]), "Authorization : Basic eDp5"},
		{bearer(p.tokens["git-user"]), "Authorization\t: Basic eDp5"},
		{bearer(p.tokens["git-user"]), "Author_ization: Basic eDp5"},
		{bearer(p.tokens["git-user"]) + "\r\n Basic eDp5"},
		{bearer(p.tokens["git-user"]) + ", Basic eDp5"},
		{bearer(p.tokens["git-user"]), "Content-Type: a\r\n\tAuthorization: Basic eDp5"},
	} {
		got := p.get(gitPort, fetchPath, headers...)
		for _, taken := range p.target.taken() {
			if credential := taken.Header["Authorization"]; len(credential) != 1 || credential[0] != want["Authorization"][0] {
				p.Errorf("with %q the target got %q", headers, credential)
			}
		}
		if got.status == 200 && !strings.Contains(headers[len(headers)-1], "_") &&
			!strings.Contains(headers[len(headers)-1], "tion :") {
			p.Errorf("%q: %d %s", headers, got.status, got.body)
		}
	}
}

// passesListedPaths asks for what may be and what may not be asked of a git server and of a package index.
func (p standardProxy) passesListedPaths() {
	token := p.tokens["git-user"]
	p.target.taken()
	reached := func() (uris []string) {
		for _, taken := range p.target.taken() {
			uris = append(uris, taken.Method+" "+taken.RequestURI)
		}
		return uris
	}
	for _, request := range []string{
		"GET /team/app.git/info/refs?service=git-upload-pack", "GET /x/info/refs?service=git-receive-pack",
		"POST /x.git/git-upload-pack", "POST /a/b/c.git/git-receive-pack",
		"GET /a%20b/%C3%A9.git/info/refs?service=git-upload-pack",
		"GET /~user/.a/..b/x.git/info/refs?service=git-upload-pack",
	} {
		method, path, _ := strings.Cut(request, " ")
		got := p.ask(gitPort, method, path, bearer(token), "Content-Length: 0")
		if uris := reached(); len(uris) != 1 || uris[0] != request {
			p.Errorf("%s: %d, and the target got %q", request, got.status, uris)
		}
	}
	for _, request := range []string{
		"GET /", "GET /api/v4/user", "POST /api/v4/personal_access_tokens", "GET /x.git/HEAD",
		"GET /x.git/objects/info/packs",
		"GET /x.git/info/refs", "GET /x.git/info/refs?service=git-upload-archive",
		"GET /x.git/info/refs?service=git-upload-pack&a=b",
		"GET /x.git/info/refs?a=b&service=git-upload-pack", "GET /x.git/info/refs?service=git-upload-pack#",
		"POST /x.git/info/lfs/objects/batch",
		"GET /x.git/git-upload-pack", "POST /x.git/info/refs?service=git-upload-pack", "PUT /x.git/git-upload-pack",
		"DELETE /x.git/git-receive-pack",
		"HEAD /x.git/info/refs?service=git-upload-pack", "PATCH /x.git/git-upload-pack",
		"get /x.git/info/refs?service=git-upload-pack",
		"GET /info/refs?service=git-upload-pack", "GET //info/refs?service=git-upload-pack",
		"GET /a//info/refs?service=git-upload-pack",
		"GET /api/v4/user/../../x.git/info/refs?service=git-upload-pack",
		"GET /x.git/../api/info/refs?service=git-upload-pack",
		"GET /./info/refs?service=git-upload-pack", "GET /x/./info/refs?service=git-upload-pack",
		"GET /x/%2e%2e/api/info/refs?service=git-upload-pack", "GET /x/%2E%2e/info/refs?service=git-upload-pack",
		"GET /api%2fv4%2fuser%2f..%2f../info/refs?service=git-upload-pack", "GET /x%2finfo/refs?service=git-upload-pack",
		"GET /api/v4/user%3fa=/info/refs?service=git-upload-pack", "GET /api/v4/user%23/info/refs?service=git-upload-pack",
		"GET /api/v4/user;/info/refs?service=git-upload-pack", "GET /api/v4/user%3b/info/refs?service=git-upload-pack",
		"GET /api/v4/user?/info/refs?service=git-upload-pack", "GET /api/v4/user#/info/refs?service=git-upload-pack",
		"GET /api\\v4\\..\\x.git/info/refs?service=git-upload-pack", "GET /x%5c..%5capi/info/refs?service=git-upload-pack",
		"GET /x%00/info/refs?service=git-upload-pack", "GET /x%0d%0aX:1/info/refs?service=git-upload-pack",
		"GET /x%252e%252e/info/refs?service=git-upload-pack",
		"GET /x\xff/info/refs?service=git-upload-pack", "GET http://git.example.com/api/v4/user",
		"GET https://kubernetes.default.svc/api",
		"GET http://x/a/../api/info/refs?service=git-upload-pack", "OPTIONS *", "TRACE /x.git/git-upload-pack",
		"CONNECT git.example.com:443",
		"GET /.connectors-proxy/may-read", "GET //.connectors-proxy/may-read", "GET /x/../.connectors-proxy/may-read",
		"GET /%2econnectors-proxy/may-read", "GET /.connectors-proxy%2fmay-read", "GET /.connectors-proxy/may-read?a=b",
		"GET /@refused",
		"POST /.connectors-proxy/may-read", "GET /apis/connectors.alauda.io/v1alpha1/namespaces/" + p.name +
			"/connectors/git", "GET /healthz",
	} {
		method, path, _ := strings.Cut(request, " ")
		got := p.ask(gitPort, method, path, bearer(token), "Content-Length: 0")
		if uris := reached(); got.status < 400 || len(uris) > 0 {
			p.Errorf("%s: %d %q, and the target got %q", request, got.status, got.body, uris)
		}
	}

	// What reads packages passes as it came, with its %2f and its query.
	token = p.tokens["npm-user"]
	for _, request := range []string{"GET /@scope%2fpackage", "GET /@scope%2Fpackage?a=%2e", "GET /a//b",
		"HEAD /package", "GET /a..b/.../.c"} {
		method, path, _ := strings.Cut(request, " ")
		got := p.ask(npmPort, method, path, bearer(token))
		if uris := reached(); got.status != 200 || len(uris) != 1 || uris[0] != request {
			p.Errorf("%s: %d, and the target got %q", request, got.status, uris)
		}
	}
	for _, request := range []string{
		"PUT /package", "POST /-/npm/v1/tokens", "DELETE /package", "PATCH /package", "GET /a/../b", "GET /..",
		"GET /a/%2e%2E/b", "GET /a%2f..%2fb",
		"GET /a/..;/b", "GET /a;/../b", "GET /a\\..\\b", "GET /a%5c..%5cb", "GET /a/..?b", "GET /a/./b",
		"GET /.connectors-proxy/may-read",
		"GET /a/.%2e/b", "GET /a/..%2f", "GET /a/..%3b/b",
	} {
		method, path, _ := strings.Cut(request, " ")
		got := p.ask(npmPort, method, path, bearer(token), "Content-Length: 0")
		if uris := reached(); got.status < 400 || len(uris) > 0 {
			p.Errorf("%s: %d %q, and the target got %q", request, got.status, got.body, uris)
		}
	}

	// Nothing but the Connectors' ports and that of the probes is open.
	for _, port := range []string{"8089", "80", "443"} {
		if conn, err := net.DialTimeout("tcp", p.pods[0]+":"+port, time.Second); err == nil {
			conn.Close()
			p.Errorf("port %s is open to other Pods", port)
		}
	}
}

// changesAnswers lets the target answer what a client must not take for an answer to its own token, or follow.
func (p standardProxy) changesAnswers() {
	headers := map[string]http.Header{
		"inside":    {"Location": {"https://git.example.com/moved.git/info/refs?service=git-upload-pack"}},
		"path":      {"Location": {"/moved.git/info/refs"}},
		"relative":  {"Location": {"../moved.git"}},
		"elsewhere": {"Location": {"https://evil.example.com/x"}},
		"scheme":    {"Location": {"//evil.example.com/x"}},
		"backslash": {"Location": {`/\evil.example.com/x`}},
		"prefix":    {"Location": {"https://git.example.com.evil.example.com/x"}},
		"user":      {"Location": {"https://git.example.com@evil.example.com/x"}},
		"script":    {"Location": {"javascript:alert(1)"}},
		"none":      {},
		"challenge": {"Www-Authenticate": {`Bearer realm="https://evil.example.com/token"`}},
		"accel":     {"X-Accel-Redirect": {"/.connectors-proxy/may-read"}, "X-Accel-Expires": {"100"}},
		"hsts": {"Strict-Transport-Security": {"max-age=1"}, "Alt-Svc": {`h3=":443"`}, "Set-Cookie": {"a=b", "c=d"},
			"Authorization": {"Basic eDp5"}},
	}
	p.target.handle("/answers/", func(w http.ResponseWriter, r *http.Request) {
		parts := strings.Split(r.URL.Path, "/")
		maps.Copy(w.Header(), headers[parts[3]])
		status, _ := strconv.Atoi(parts[2])
		w.WriteHeader(status)
		fmt.Fprint(w, "the target's answer")
	})
	for path, want := range sorted(map[string]struct {
		status         int
		location, body string
	}{
		"200/none": {200, "", "the target's answer"}, "403/none": {403, "", "the target's answer"}, "404/none": {404, "",
			"the target's answer"},
		"500/none": {500, "", "the target's answer"}, "503/none": {503, "", "the target's answer"}, "304/none": {304, "",
			""},
		"401/none": {502, "", "The target refuses"}, "401/challenge": {502, "", "The target refuses"}, "407/none": {502,
			"", "The target refuses"},
		"301/inside": {307, "/moved.git/info/refs?service=git-upload-pack", ""}, "302/path": {307, "/moved.git/info/refs",
			""},
		"303/inside": {303, "/moved.git/info/refs?service=git-upload-pack", ""}, "308/relative": {307, "../moved.git", ""},
		"301/elsewhere": {502, "", "another host"}, "302/scheme": {502, "", "another host"}, "303/backslash": {502, "",
			"another host"},
		"307/prefix": {502, "", "another host"}, "308/user": {502, "", "another host"}, "302/script": {502, "",
			"another host"},
		"302/none": {502, "", "another host"}, "200/accel": {200, "", "the target's answer"}, "200/hsts": {200, "",
			"the target's answer"},
		"201/inside": {201, "/moved.git/info/refs?service=git-upload-pack", ""}, "201/elsewhere": {201, "", ""},
	}) {
		got := p.get(gitPort, "/answers/"+path+"/info/refs?service=git-upload-pack", bearer(p.tokens["git-user"]))
		if got.status != want.status || got.header.Get("Location") != want.location || !strings.Contains(got.body,
			want.body) {
			p.Errorf("%s: %d, %v, %q", path, got.status, got.header, got.body)
		}
		for _, header := range []string{"Set-Cookie", "Alt-Svc", "Strict-Transport-Security", "X-Accel-Redirect",
			"Authorization"} {
			if got.header.Get(header) != "" {
				p.Errorf("%s: %s passes", path, header)
			}
		}
		if got.header.Get("Server") != "nginx" {
			p.Errorf("%s: the server is %q", path, got.header.Get("Server"))
		}
	}
}

// verifiesTargets asks Connectors whose targets have a certificate of another authority, or of another name.
func (p standardProxy) verifiesTargets() {
	p.target.taken()
	for _, port := range []string{"8090", "8091"} {
		if got := p.get(port, "/greeting", bearer(p.tokens["viewer"])); got.status != 502 {
			p.Errorf("port %s: %d %s", port, got.status, got.body)
		}
	}
	if taken := p.target.taken(); len(taken) > 0 {
		p.Errorf("an impostor got %d requests", len(taken))
	}
}

// streams sends and receives 300 MB, of which the first bytes must arrive while the last ones are not yet sent.
func (p standardProxy) streams() {
	const size = 300 << 20
	block := make([]byte, 1<<20)
	first, proceed, sent := make(chan bool, 1), make(chan bool, 1), make(chan bool)
	p.target.handle("/stream/", func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "POST" {
			if _, err := io.ReadFull(r.Body, make([]byte, 1)); err == nil {
				first <- true
			}
			n, _ := io.Copy(io.Discard, r.Body)
			fmt.Fprint(w, n+1)
			return
		}
		w.Write(block[:1])
		w.(http.Flusher).Flush()
		<-proceed
		for range size / len(block) {
			w.Write(block)
		}
		close(sent)
	})
	base := "http://" + p.pods[0] + ":" + gitPort + "/stream/x.git/"
	authorize := func(r *http.Request) *http.Request {
		r.Header.Set("Authorization", "Bearer "+p.tokens["git-user"])
		return r
	}
	reader, writer := io.Pipe()
	go func() {
		writer.Write(block[:1])
		select {
		case <-first:
		case <-time.After(20 * time.Second):
			writer.CloseWithError(errors.New("the first byte does not arrive before the rest is sent"))
		}
		for range size / len(block) {
			writer.Write(block)
		}
		writer.Close()
	}()
	request, err := http.NewRequest("POST", base+"git-receive-pack", reader)
	if err != nil {
		p.Fatal(err)
	}
	began := time.Now()
	response, err := http.DefaultClient.Do(authorize(request))
	if err != nil {
		p.Fatal(err)
	}
	body, err := io.ReadAll(response.Body)
	response.Body.Close()
	if err != nil || string(body) != strconv.Itoa(size+1) {
		p.Errorf("of %d bytes %q arrived: %v", size+1, body, err)
	}
	p.Logf("300 MB up: %v", time.Since(began).Round(10*time.Millisecond))

	if request, err = http.NewRequest("GET", base+"info/refs?service=git-upload-pack", nil); err != nil {
		p.Fatal(err)
	}
	began = time.Now()
	if response, err = http.DefaultClient.Do(authorize(request)); err != nil {
		p.Fatal(err)
	}
	defer response.Body.Close()
	if _, err := io.ReadFull(response.Body, block[:1]); err != nil {
		p.Fatal(err)
	}
	proceed <- true
	select {
	case <-sent:
		p.Error("the proxy takes all of an answer that its client does not read")
	case <-time.After(2 * time.Second):
	}
	began = began.Add(2 * time.Second)
	if n, err := io.Copy(io.Discard, response.Body); err != nil || n != size {
		p.Errorf("%d bytes arrived: %v", n, err)
	}
	p.Logf("300 MB down: %v", time.Since(began).Round(10*time.Millisecond))
	if restarts := p.kubectl("get", "pods", proxyPods,
		"--output=jsonpath={.items[*].status.containerStatuses[*].restartCount}"); restarts != "0 0" {
		p.Errorf("the proxy was restarted: %s", restarts)
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
	node.targets.serve("registry.example.com", http.RedirectHandler(blob, http.StatusTemporaryRedirect))
	if got := p.get("8085", "/v2/x/blobs/y", bearer(p.tokens["viewer"])); got.status != 307 ||
		got.header.Get("Location") != blob {
		p.Errorf("a redirect of the registry: %d, %v", got.status, got.header)
	}
	node.targets.serve("npm.example.com", withToken("change-me", npmRegistry(p.T)))
	node.targets.serve("pip.example.com", withPassword("bot", "change-me", pythonIndex(p.T)))
	node.targets.serve("curl.example.com", withPassword("bot", "change-me",
		serve(map[string]string{"greeting": "hello from curl"})))
	node.targets.serve("registry.example.com", withPassword("bot", "change-me", containerRegistry(p.T)))
	configuration := map[string]string{"npm": "npmrc", "pip": "pipconf", "curl": "curlrc", "registry": "registry-config"}
	for _, c := range proxiedClients {
		p.pod(c.name, fmt.Sprintf("{connector.name: %s, configuration.names: %s}", c.name, configuration[c.name]))
	}
	for _, c := range proxiedClients {
		p.running(c.name)
		volume := volumeDir(p.uid(c.name), "volume")
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

// servesTLS rolls the component "tls" out, with a certificate of the targets' authority, and clones in a Pod.
func (p standardProxy) servesTLS() {
	certificate, key, err := node.targets.renew(p.host("git"))
	if err != nil {
		p.Fatal(err)
	}
	dir := p.copyExample("more", "tls")
	writeFile(p.T, dir+"/tls.crt", certificate)
	writeFile(p.T, dir+"/tls.key", key)
	p.kubectl("create", "secret", "tls", "connectors-proxy-tls", "--cert="+dir+"/tls.crt", "--key="+dir+"/tls.key")
	class, _, _ := strings.Cut(readFile(p.T, dir+"/tls/class.yaml"), "        -----BEGIN")
	authority := strings.TrimSpace(readFile(p.T, node.path(targetCA)))
	writeFile(p.T, dir+"/tls/class.yaml", class+"        "+strings.ReplaceAll(authority, "\n", "\n        ")+"\n")
	p.kubectl("apply", "-k", dir)
	p.rolledOut()
	p.apply(strings.Replace(podManifest("tls", `{connector.name: git, configuration.names: config}`), "/volume",
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
	p.settle()
	p.pods = p.podIPs()
	first := serial()
	if certificate, key, err = node.targets.renew(p.host("git")); err != nil {
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
	p.kubectl("create", "configmap", "wrong", "--from-file=ca.crt="+node.path(targetCA))
	p.kubectl("patch", "deployment", "connectors-proxy", "--patch",
		`{"spec": {"template": {"spec": {"volumes": [{"name": "kubernetes", "configMap": {"name": "wrong"}}]}}}}`)
	p.rolledOut()
	p.settle()
	p.pods = p.podIPs()
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
