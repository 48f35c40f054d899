package main

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Tokens are JSON Web Tokens as the API server issues them: header.payload.signature. All of them begin alike and
// have the same mark in their signature, so that a search for a few strings finds any part of any token.

var tokenHeader = base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"HS256","kid":"the-key-of-the-test-cluster"}`))

const signatureMark = "this-is-a-signature:" // followed by the real one

// fileMark is in files of the test's classes and nowhere else.
const fileMark = "written-into-files-only"

type claims struct {
	Audience   []string `json:"aud"`
	Expires    int64    `json:"exp"`
	Kubernetes struct {
		Namespace      string            `json:"namespace"`
		Pod            map[string]string `json:"pod,omitempty"`
		ServiceAccount map[string]string `json:"serviceaccount"`
	} `json:"kubernetes.io"`
	Subject string `json:"sub"`
	Serial  int64  `json:"jti"`
}

var serial atomic.Int64

func sign(payload string) string {
	h := hmac.New(sha256.New, []byte("key"))
	io.WriteString(h, payload)
	return base64.RawURLEncoding.EncodeToString(append([]byte(signatureMark), h.Sum(nil)...))
}

// issue makes a token of a ServiceAccount, bound to the Pod if there is one.
func issue(namespace, serviceAccount string, pod map[string]string, lifetime time.Duration,
	audiences ...string) string {
	c := claims{Audience: audiences, Expires: time.Now().Add(lifetime).Unix(), Serial: serial.Add(1)}
	c.Kubernetes.Namespace, c.Kubernetes.Pod = namespace, pod
	c.Kubernetes.ServiceAccount = map[string]string{"name": serviceAccount, "uid": "5a"}
	c.Subject = "system:serviceaccount:" + namespace + ":" + serviceAccount
	text, _ := json.Marshal(c)
	payload := base64.RawURLEncoding.EncodeToString(text)
	return tokenHeader + "." + payload + "." + sign(payload)
}

func driverToken() string {
	namespace, name, _ := strings.Cut(driverUser, "/")
	return issue(namespace, name, map[string]string{"name": "connectors-csi-x", "uid": "d"}, time.Hour, apiAudience)
}

func decodeClaims(token string) (c claims, ok bool) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return c, false
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	return c, err == nil && json.Unmarshal(text, &c) == nil
}

// secretIn names the secret that the text contains, or "".
func secretIn(text string) string {
	base64Of := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	for what, secret := range sorted(map[string]string{
		"a token's header":                tokenHeader,
		"a token's header in base64":      base64Of(tokenHeader)[:40],
		"a token's header in Basic":       base64Of(":" + tokenHeader)[:40],
		"a token's payload":               base64.RawURLEncoding.EncodeToString([]byte(`{"aud":["http`))[:16],
		"a token's signature":             base64.RawURLEncoding.EncodeToString([]byte(signatureMark))[:26],
		"the content of a file":           fileMark,
		"the content of a file in base64": base64Of(fileMark)[:30],
	}) {
		if i := strings.Index(text, secret); i >= 0 {
			return fmt.Sprintf("%s: … %q …", what, text[max(0, i-200):min(len(text), i+200)])
		}
	}
	return ""
}

// apiServer is an API server: it holds objects, checks tokens, and answers as Kubernetes does.
type apiServer struct {
	*httptest.Server
	t testing.TB

	mu          sync.Mutex
	objects     map[string][]byte // by path
	version     int               // the last resourceVersion
	history     []apiEvent        // since the version horizon
	horizon     int
	streams     map[*apiStream]bool // that are open
	watches     []watchRequest      // that have come
	noWatch     bool                // nobody may watch
	down        chan struct{}       // is closed when the server is
	forbidden   map[string]bool     // "namespace/serviceaccount path", or "namespace/serviceaccount watch path"
	ended       map[string]bool     // tokens that are accepted no more
	noTokens    bool                // the driver may not request tokens
	podUIDs     map[string]bool
	lifetime    time.Duration // of the tokens it issues, if not what the request asks for
	clock       time.Duration // how far its clock is ahead of the node's
	requests    map[string]int
	readers     map[string]string // who was the last to ask for a path
	lastRequest map[string]object // the last body by path
	driverToken string            // that the driver used last
	intercept   func(http.ResponseWriter, *http.Request) bool
	connections atomic.Int32
	protocols   map[string]bool
}

func newAPIServer(t testing.TB) *apiServer {
	a := &apiServer{t: t, objects: map[string][]byte{}, forbidden: map[string]bool{}, podUIDs: map[string]bool{},
		streams: map[*apiStream]bool{}, ended: map[string]bool{},
		requests: map[string]int{}, readers: map[string]string{}, lastRequest: map[string]object{},
		protocols: map[string]bool{}}
	a.listen("127.0.0.1:0")
	t.Cleanup(a.Close)
	return a
}

// listen starts the server.
func (a *apiServer) listen(address string) {
	a.down = make(chan struct{})
	a.Server = httptest.NewUnstartedServer(a)
	a.Server.Listener.Close()
	eventually(a.t, "the API server has its address", func() (ok bool) {
		listener, err := net.Listen("tcp", address)
		a.Server.Listener = listener
		return err == nil
	})
	a.EnableHTTP2 = true
	a.Config.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: 100}
	a.Config.ErrorLog = slog.NewLogLogger(slog.NewTextHandler(io.Discard, nil), slog.LevelError)
	a.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			a.connections.Add(1)
		}
	}
	a.StartTLS()
}

// Close stops the server, with all its connections. It keeps its objects.
func (a *apiServer) Close() {
	a.set(func() {
		select {
		case <-a.down:
		default:
			close(a.down)
		}
	})
	a.Listener.Close()
	a.CloseClientConnections()
	a.Server.Close()
}

// restart starts the server again, after Close or by itself. What was before it knows no more.
func (a *apiServer) restart() {
	a.Close()
	a.forgetHistory()
	a.listen(a.Listener.Addr().String())
}

// forgetHistory makes the server answer 410 to whom wants to know what came after an older resourceVersion.
func (a *apiServer) forgetHistory() {
	a.set(func() { a.history, a.horizon = nil, a.version })
}

func connectorPath(namespace, name string) string {
	return "/apis/connectors.alauda.io/v1alpha1/namespaces/" + namespace + "/connectors/" + name
}

func classPath(name string) string {
	return "/apis/connectors.alauda.io/v1alpha1/connectorclasses/" + name
}

func tokenPath(namespace, serviceAccount string) string {
	return "/api/v1/namespaces/" + namespace + "/serviceaccounts/" + serviceAccount + "/token"
}

// put creates or changes objects.
func (a *apiServer) put(objects ...object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, o := range objects {
		metadata := o["metadata"].(object)
		path := classPath(metadata["name"].(string))
		if namespace, ok := metadata["namespace"].(string); ok {
			path = connectorPath(namespace, metadata["name"].(string))
		}
		a.version++
		kind, uid := "MODIFIED", stringAt(decoded(a.objects[path]), "metadata", "uid")
		if a.objects[path] == nil {
			kind, uid = "ADDED", fmt.Sprintf("uid-%d", a.version)
		}
		metadata["resourceVersion"], metadata["uid"] = strconv.Itoa(a.version), uid
		text, err := json.Marshal(o)
		must(a.t, err)
		a.objects[path] = text
		a.tell(apiEvent{kind, path, a.version, text})
	}
}

func (a *apiServer) remove(path string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.version++
	o := decoded(a.objects[path])
	with(strconv.Itoa(a.version), "metadata", "resourceVersion")(o)
	text, err := json.Marshal(o)
	must(a.t, err)
	delete(a.objects, path)
	a.tell(apiEvent{"DELETED", path, a.version, text})
}

func decoded(text []byte) (o object) {
	json.Unmarshal(text, &o)
	return o
}

// forbid takes the right to read the path from a ServiceAccount ("namespace/name"), or to watch it ("watch path").
func (a *apiServer) forbid(serviceAccount, path string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.forbidden[serviceAccount+" "+path] = true
}

// allow gives it back.
func (a *apiServer) allow(serviceAccount, path string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.forbidden, serviceAccount+" "+path)
}

// set changes the server's behaviour.
func (a *apiServer) set(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
}

// lastBody returns what came with the last request for the path.
func (a *apiServer) lastBody(path string) (body object) {
	a.set(func() { body = a.lastRequest[path] })
	return body
}

// lastReader returns who was the last to ask for the path.
func (a *apiServer) lastReader(path string) (user string) {
	a.set(func() { user = a.readers[path] })
	return user
}

// lastDriverToken returns the token of the driver's last request.
func (a *apiServer) lastDriverToken() (token string) {
	a.set(func() { token = a.driverToken })
	return token
}

// count tells how often the path was asked for, or anything at all where it is "". Watches do not count.
func (a *apiServer) count(path string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	if path != "" {
		return a.requests[path]
	}
	sum := 0
	for _, n := range a.requests {
		sum += n
	}
	return sum
}

// countFromNow returns what returns how often the path is asked for from now on.
func (a *apiServer) countFromNow(path string) (count func() int) {
	begin := a.count(path)
	return func() int { return a.count(path) - begin }
}

// gate keeps requests waiting.
type gate struct {
	t       testing.TB
	waiting atomic.Int32
	opened  chan struct{}
	open    func()
}

// await waits until so many requests wait, which means what the text says.
func (g *gate) await(count int, what string) {
	g.t.Helper()
	eventually(g.t, what, func() bool { return g.waiting.Load() == int32(count) })
}

// hold makes the requests whose URI contains the text wait until the gate is opened.
func (a *apiServer) hold(text string) *gate {
	g := &gate{t: a.t, opened: make(chan struct{})}
	g.open = sync.OnceFunc(func() { close(g.opened) })
	a.t.Cleanup(g.open)
	a.set(func() {
		a.intercept = func(_ http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.RequestURI(), text) {
				g.waiting.Add(1)
				defer g.waiting.Add(-1)
				select {
				case <-g.opened:
				case <-r.Context().Done():
				}
			}
			return false
		}
	})
	return g
}

// answer makes the requests whose URI contains the text end with this answer, until it is called with "".
func (a *apiServer) answer(text string, code int, body string, header ...string) {
	a.set(func() {
		a.intercept = func(w http.ResponseWriter, r *http.Request) bool {
			if text == "" || !strings.Contains(r.URL.RequestURI(), text) {
				return false
			}
			for pair := range slices.Chunk(header, 2) {
				w.Header().Set(pair[0], pair[1])
			}
			w.WriteHeader(code)
			io.WriteString(w, body)
			return true
		}
	})
}

// statusBody is the object that the API server answers with where it answers with an error.
func statusBody(code int, reason, format string, a ...any) string {
	text, _ := json.Marshal(object{"kind": "Status", "apiVersion": "v1", "metadata": object{}, "status": "Failure",
		"message": fmt.Sprintf(format, a...), "reason": reason, "details": object{}, "code": code})
	return string(text)
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	var sent object
	json.Unmarshal(body, &sent)
	token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	c, _ := decodeClaims(token)
	user := c.Kubernetes.Namespace + "/" + c.Kubernetes.ServiceAccount["name"]
	watching := r.URL.Query().Has("watch")
	a.mu.Lock()
	down := a.down
	if watching {
		a.watches = append(a.watches, parseWatch(r, user, token))
	} else {
		a.requests[r.URL.Path]++
	}
	a.readers[r.URL.Path], a.lastRequest[r.URL.Path], a.protocols[r.Proto] = user, sent, true
	if user == driverUser {
		a.driverToken = token
	}
	intercept := a.intercept
	a.mu.Unlock()
	if intercept != nil && intercept(w, r) {
		return
	}

	a.mu.Lock()
	defer a.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	select {
	case <-down:
		panic(http.ErrAbortHandler)
	default:
	}
	fail := func(code int, reason, format string, args ...any) {
		w.WriteHeader(code)
		io.WriteString(w, statusBody(code, reason, format, args...))
	}
	parts := strings.Split(token, ".")
	authentic := len(parts) == 3 && parts[2] == sign(parts[1]) && c.Expires > time.Now().Unix() &&
		slices.Contains(c.Audience, apiAudience) && !a.ended[token]
	isDriver, isClass := user == driverUser, strings.Contains(r.URL.Path, "/connectorclasses")
	subject := "system:serviceaccount:" + strings.Replace(user, "/", ":", 1)
	switch {
	case !authentic:
		fail(http.StatusUnauthorized, "Unauthorized", "Unauthorized")
	case watching:
		request := parseWatch(r, user, token)
		resource := strings.Split(request.path, "/")
		switch {
		case request.malformed:
			fail(http.StatusBadRequest, "BadRequest", "malformed watch: %s", r.URL.RawQuery)
		case a.noWatch || a.forbidden[user+" watch "+request.path] || isDriver != isClass:
			fail(http.StatusForbidden, "Forbidden",
				`%s.connectors.alauda.io %q is forbidden: User %q cannot watch resource %q in API group "connectors.alauda.io"`,
				resource[len(resource)-2], resource[len(resource)-1], subject, resource[len(resource)-2])
		default:
			a.serveWatch(w, r, request, down)
		}
	case strings.HasSuffix(r.URL.Path, "/token"):
		a.issueToken(w, r.URL.Path, sent, fail, isDriver && !a.noTokens, subject)
	case a.forbidden[user+" "+r.URL.Path] || isDriver != isClass:
		resource := strings.Split(r.URL.Path, "/")
		fail(http.StatusForbidden, "Forbidden",
			`%s.connectors.alauda.io %q is forbidden: User %q cannot get resource %q in API group "connectors.alauda.io"`,
			resource[len(resource)-2], resource[len(resource)-1], subject, resource[len(resource)-2])
	case a.objects[r.URL.Path] == nil:
		resource := strings.Split(r.URL.Path, "/")
		fail(http.StatusNotFound, "NotFound", "%s.connectors.alauda.io %q not found", resource[len(resource)-2],
			resource[len(resource)-1])
	default:
		w.Write(a.objects[r.URL.Path])
	}
}

// watchRequest is a request to watch one object.
type watchRequest struct {
	reader, path, token string // the path is that of the object
	version             string // from which on; "" for the present
	seconds             int    // that the stream may last
	metadataOnly        bool   // as PartialObjectMetadata
	malformed           bool
}

func parseWatch(r *http.Request, reader, token string) watchRequest {
	query := r.URL.Query()
	name, one := strings.CutPrefix(query.Get("fieldSelector"), "metadata.name=")
	seconds, err := strconv.Atoi(query.Get("timeoutSeconds"))
	_, err2 := strconv.ParseUint(cmp.Or(query.Get("resourceVersion"), "0"), 10, 63)
	w := watchRequest{reader, r.URL.Path + "/" + name, token, query.Get("resourceVersion"), seconds, false, false}
	w.metadataOnly = r.Header.Get("Accept") == "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
	query.Del("resourceVersion")
	w.malformed = r.Method != http.MethodGet || query.Get("watch") != "1" || query.Get("allowWatchBookmarks") != "true" ||
		!one || !isDNSName(name) || cmp.Or(err, err2) != nil || seconds <= 0 || len(query) != 4
	return w
}

// apiEvent is a change of an object.
type apiEvent struct {
	kind, path string // ADDED, MODIFIED or DELETED
	version    int
	object     []byte
}

// apiStream is an answer to a watch that goes on.
type apiStream struct {
	watchRequest
	api     *apiServer
	lines   chan string // to be sent; closed when the stream shall end
	aborted bool        // it shall end as one of a server that dies
}

// serveWatch answers a watch:
//
//  1. with what has happened since the resourceVersion; or, without one, with the object as it is
//  2. with what happens to the object, until the time is over or the test ends the stream
//
// The caller holds the lock, which is given back while the stream is open.
func (a *apiServer) serveWatch(w http.ResponseWriter, r *http.Request, request watchRequest, down chan struct{}) {
	s := &apiStream{watchRequest: request, api: a, lines: make(chan string, 10_000)}
	a.streams[s] = true

	// 1. what was
	since, _ := strconv.Atoi(request.version)
	current := a.objects[request.path]
	switch {
	case request.version == "" && current != nil:
		s.tell(apiEvent{"ADDED", request.path, a.version, current})
	case request.version != "" && since < a.horizon:
		s.fail(http.StatusGone, "Expired")
		s.end()
	case request.version != "":
		for _, e := range a.history {
			if e.version > since && e.path == s.path {
				s.tell(e)
			}
		}
	}

	// 2. what comes
	a.mu.Unlock()
	defer func() {
		a.mu.Lock() // the caller's
		delete(a.streams, s)
	}()
	w.WriteHeader(http.StatusOK)
	flush := http.NewResponseController(w).Flush
	timeout := time.After(time.Duration(request.seconds) * time.Second)
	for flush() == nil {
		select {
		case line, more := <-s.lines:
			if !more && s.aborted {
				panic(http.ErrAbortHandler)
			} else if !more {
				return
			}
			io.WriteString(w, line)
		case <-down:
			panic(http.ErrAbortHandler)
		case <-timeout:
			return
		case <-r.Context().Done():
			return
		}
	}
}

// tell sends an event to those who watch its object. The caller holds the lock.
func (a *apiServer) tell(e apiEvent) {
	a.history = append(a.history, e)
	for s := range a.streams {
		if s.path == e.path {
			s.tell(e)
		}
	}
}

// tell is what the server does, with the lock held; the test uses the methods below. A client that does not read is
// not waited for.
func (s *apiStream) tell(e apiEvent) {
	text := string(e.object)
	if s.metadataOnly {
		metadata, _ := json.Marshal(decoded(e.object)["metadata"])
		text = fmt.Sprintf(`{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":%s}`, metadata)
	}
	s.queue(fmt.Sprintf(`{"type":%q,"object":%s}`, e.kind, text) + "\n")
}

func (s *apiStream) queue(text string) {
	if !s.api.streams[s] {
		return // it has ended
	}
	select {
	case s.lines <- text:
	default:
		s.end()
	}
}

// end ends the stream after what was sent. The caller holds the lock.
func (s *apiStream) end() {
	if s.api.streams[s] {
		delete(s.api.streams, s)
		close(s.lines)
	}
}

// close ends the stream after what was sent, in good order or as a server does that dies.
func (s *apiStream) close(abort bool) {
	s.api.set(func() {
		s.aborted = abort
		s.end()
	})
}

func (s *apiStream) fail(code int, reason string) {
	s.queue(fmt.Sprintf(`{"type":"ERROR","object":%s}`, statusBody(code, reason, "the test says so")) + "\n")
}

// send sends text as it is: not a whole line, more than one, or a huge one.
func (s *apiStream) send(text string) { s.api.set(func() { s.queue(text) }) }

// bookmark tells the server's version.
func (s *apiStream) bookmark() {
	s.api.set(func() {
		s.queue(fmt.Sprintf(`{"type":"BOOKMARK","object":{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1",`+
			`"metadata":{"resourceVersion":"%d","creationTimestamp":null}}}`, s.api.version) + "\n")
	})
}

// stream waits until the reader has a stream for the path, and returns it.
func (a *apiServer) stream(reader, path string) (found *apiStream) {
	a.t.Helper()
	eventually(a.t, reader+" watches "+path, func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		for s := range a.streams {
			if s.reader == reader && s.path == path {
				found = s
			}
		}
		return found != nil
	})
	return found
}

// awaitStreams waits until so many streams are open, and there are no more.
func (a *apiServer) awaitStreams(count int) {
	a.t.Helper()
	eventually(a.t, fmt.Sprintf("%d streams are open", count), func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return len(a.streams) == count
	})
}

// watched returns the requests to watch the path that have come.
func (a *apiServer) watched(path string) (requests []watchRequest) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, w := range a.watches {
		if w.path == path {
			requests = append(requests, w)
		}
	}
	return requests
}

// issueToken answers a TokenRequest, under the API server's rules for it and those of deploy.yaml's policies that need
// no Pods.
func (a *apiServer) issueToken(w http.ResponseWriter, path string, sent object, fail func(int, string, string, ...any),
	allowed bool, user string) {
	parts := strings.Split(path, "/")
	namespace, serviceAccount := parts[4], parts[6]
	seconds, _ := valueAt(sent, "spec", "expirationSeconds").(float64)
	podName, uid := stringAt(sent, "spec", "boundObjectRef", "name"), stringAt(sent, "spec", "boundObjectRef", "uid")
	switch {
	case !allowed:
		fail(http.StatusForbidden, "Forbidden",
			`serviceaccounts %q is forbidden: User %q cannot create resource "serviceaccounts/token" in API group "" in the `+
				`namespace %q`,
			serviceAccount, user, namespace)
		return
	case stringAt(sent, "metadata", "labels", "app.kubernetes.io/name") != "connectors-csi":
		fail(http.StatusForbidden, "Forbidden",
			"the driver may request tokens only with the label app.kubernetes.io/name=connectors-csi")
		return
	case seconds < 600:
		fail(http.StatusUnprocessableEntity, "Invalid",
			"spec.expirationSeconds: Invalid value: %v: may not specify a duration less than 10 minutes", seconds)
		return
	case stringAt(sent, "spec", "boundObjectRef", "kind") != "Pod" || !a.podUIDs[uid]:
		fail(http.StatusConflict, "Conflict", "the UID in the bound object reference (%s) does not match the UID in record",
			uid)
		return
	}
	lifetime := time.Duration(seconds) * time.Second
	if a.lifetime != 0 {
		lifetime = a.lifetime
	}
	audiences := []string{apiAudience}
	if list, ok := valueAt(sent, "spec", "audiences").([]any); ok {
		audiences = nil
		for _, audience := range list {
			audiences = append(audiences, audience.(string))
		}
	}
	w.WriteHeader(http.StatusCreated)
	spec := maps.Clone(sent["spec"].(object))
	spec["expirationSeconds"] = int64(lifetime / time.Second)
	json.NewEncoder(w).Encode(object{"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "spec": spec,
		"status": object{
			"token": issue(namespace, serviceAccount, map[string]string{"name": podName, "uid": uid}, lifetime,
				audiences...),
			"expirationTimestamp": time.Now().Add(a.clock).Add(lifetime).UTC().Format(time.RFC3339),
		}})
}
