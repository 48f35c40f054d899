package tests

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectors-csi/e2e/node"
)

// What the tests of examples/proxy send to it, and what reaches its targets.

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
	block, _ := pem.Decode([]byte(readFile(p.T, theNode.Path("service-account.key"))))
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
	backend, err := node.GitBackend(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	target := &recordingTarget{handlers: map[string]http.Handler{"/team/": node.WithPassword("bot", "change-me", backend)}}
	before := theNode.Targets.Handlers["git.example.com"]
	for _, name := range []string{"git", "npm", "untrusted", "misnamed"} {
		theNode.Targets.Serve(name+".example.com", target)
	}
	t.Cleanup(func() { theNode.Targets.Serve("git.example.com", before) })
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
