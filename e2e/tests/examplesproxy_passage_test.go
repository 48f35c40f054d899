package tests

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// What the proxy of examples/proxy lets pass, and what it makes of it.

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
