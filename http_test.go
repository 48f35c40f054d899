package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// exchange sends the text to the driver's HTTP port and returns all that comes back until the connection ends.
func (n *node) exchange(request string) string {
	n.t.Helper()
	conn, err := net.Dial("tcp", n.http)
	must(n.t, err)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	io.WriteString(conn, request)
	answer, err := io.ReadAll(conn)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		n.t.Errorf("the connection stays open after %.60q", request)
	}
	return string(answer)
}

func TestHTTP(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	for path, want := range sorted(map[string]int{"/healthz": 200, "/healthz?verbose": 200, "/readyz": 503,
		"/metrics": 200,
		"/":        404, "/healthz/": 404, "//healthz": 404}) {
		if code, body := n.get(path); code != want {
			t.Errorf("%s answers %d, %q, not %d", path, code, body, want)
		}
	}
	for what, c := range sorted(map[string]struct{ request, answer string }{
		"HTTP/1.0": {"GET /healthz HTTP/1.0\r\n\r\n", "200 OK"},
		"another method": {"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
			"405 Method Not Allowed"},
		"keep-alive": {"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n\r\n",
			"Connection: close\r\n"},
		"a long header": {"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 3000) + "\r\n\r\n",
			"200 OK"},
		"too long a header":    {"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 4096) + "\r\n\r\n", ""},
		"too long a line":      {"GET /" + strings.Repeat("x", 1<<20) + " HTTP/1.1\r\nHost: x\r\n\r\n", ""},
		"no request":           {"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", ""},
		"no end of the header": {"GET /healthz HTTP/1.1\r\nHost: x\r\n", ""},
	}) {
		began := time.Now()
		answer := n.exchange(c.request)
		if !strings.Contains(answer, c.answer) || c.answer == "" && strings.Contains(answer, "200") {
			t.Errorf("%s: the answer is %q", what, answer)
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("%s: the connection ends after %v", what, took)
		}
	}
	answer := n.exchange(strings.Repeat("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 20))
	if strings.Count(answer, "200 OK") > 1 {
		t.Errorf("a connection is good for more than one request: %q", answer)
	}
}

// /healthz says how the socket does, which it asks once a second at most. What people see who may not see more has no
// name and no path.
func TestHealth(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	r := &registration{socket: n.dir + "/other"}
	conn, err := grpc.NewClient("unix:"+r.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer listener.Close()
	w := &web{registration: r, metrics: n.driver.metrics}
	go w.serve(listener.(*net.TCPListener))
	go w.checkHealth(t.Context(), csi.NewIdentityClient(conn))
	n.http = listener.Addr().String()
	becomes := func(path string, wantCode int, want string) {
		t.Helper()
		eventually(t, path+" changes", func() bool { code, body := n.get(path); return code == wantCode && body == want })
	}
	const failed = "the driver does not answer its own call: Unavailable\n"
	becomes("/healthz", 503, failed)
	becomes("/readyz", 503, "the registration socket is gone\n")
	if code, _ := n.get("/metrics"); code != 200 {
		t.Errorf("/metrics answers %d", code)
	}

	var calls atomic.Int64
	count := func(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		calls.Add(1)
		return handler(ctx, request)
	}
	server := grpc.NewServer(grpc.UnaryInterceptor(count))
	csi.RegisterIdentityServer(server, n.driver)
	socket, err := net.Listen("unix", r.socket)
	must(t, err)
	go server.Serve(socket)
	began := time.Now()
	becomes("/healthz", 200, "ok\n")
	for range 300 {
		becomes("/healthz", 200, "ok\n")
	}
	if most := int64(time.Since(began)/time.Second) + 2; calls.Load() > most {
		t.Errorf("the driver was called %d times in %v", calls.Load(), time.Since(began))
	}
	server.Stop()
	becomes("/healthz", 503, failed)
}

// hold opens a connection to the port from the address and says nothing.
func (n *node) hold(address string) net.Conn {
	n.t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
	conn, err := dialer.Dial("tcp", n.http)
	must(n.t, err)
	n.t.Cleanup(func() { conn.Close() })
	return conn
}

// isOpen reports whether the connection has been left alone for a moment.
func isOpen(conn net.Conn) bool {
	conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	_, err := conn.Read(make([]byte, 1))
	return errors.Is(err, os.ErrDeadlineExceeded)
}

// A connection too many displaces the oldest of the address that has the most.
func TestHTTPDisplacesTheOldestOfTheMost(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	var few, many []net.Conn
	for range 3 {
		few = append(few, n.hold("127.0.0.3"))
	}
	for range maxWebConnections - len(few) {
		many = append(many, n.hold("127.0.0.2"))
	}
	if !isOpen(many[0]) || !isOpen(few[0]) {
		t.Error("a connection was displaced too early")
	}
	few = append(few, n.hold("127.0.0.3"), n.hold("127.0.0.4"))
	if code, _ := n.get("/healthz"); code != 200 {
		t.Errorf("/healthz answers %d", code)
	}
	for _, conn := range many[:3] { // two were displaced by those before, and one by the probe
		eventually(t, "the oldest of the address with the most is displaced", func() bool { return !isOpen(conn) })
	}
	if !isOpen(many[3]) || !isOpen(many[4]) {
		t.Error("more connections were displaced")
	}
	for i, conn := range few {
		if !isOpen(conn) {
			t.Errorf("connection %d of an address with few was displaced", i)
		}
	}

	n = startNode(t)
	var each []net.Conn
	for i := range maxWebConnections {
		each = append(each, n.hold(fmt.Sprint("127.0.1.", 1+i)))
	}
	n.hold("127.0.0.2")
	eventually(t, "where all have the same, the oldest is displaced", func() bool { return !isOpen(each[0]) })
	if !isOpen(each[1]) {
		t.Error("where all have the same, more than the oldest are displaced")
	}
}

// Whatever is sent, the answer is one of the few that there are; a panic would end the driver.
func FuzzHTTP(f *testing.F) {
	for _, request := range []string{"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://x/metrics?a HTTP/1.0\r\n\r\n",
		"CONNECT x:80 HTTP/1.1\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTrailer: a\r\n\r\n0\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"} {
		f.Add([]byte(request))
	}
	w := &web{registration: &registration{socket: "/none"}, metrics: newMetrics(&budget{})}
	f.Fuzz(func(t *testing.T, text []byte) {
		request, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(text)))
		if err != nil {
			return
		}
		switch code, text := w.page(request); code {
		case 200, 404, 405, 503:
			if strings.Contains(text, "\r") || !strings.HasSuffix(text, "\n") {
				t.Errorf("the answer is %q", text)
			}
		default:
			t.Errorf("code %d", code)
		}
	})
}

// ---- Whoever reaches the port ----

// nasty are the ways to be a nuisance to a server, each with a connection to it that is closed afterwards.
var nasty = map[string]func(*net.TCPConn){
	"idle":      func(c *net.TCPConn) { io.Copy(io.Discard, c) },
	"half-open": func(c *net.TCPConn) { c.CloseWrite(); io.Copy(io.Discard, c) },
	"reset":     func(c *net.TCPConn) { c.SetLinger(0) },
	"one header": func(c *net.TCPConn) {
		io.WriteString(c, "GET /healthz HTTP/1.1\r\nX: ")
		c.Write(kib1000)
		io.Copy(io.Discard, c)
	},
	"many headers": func(c *net.TCPConn) {
		io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\n")
		io.WriteString(c, strings.Repeat("a:\r\n", 250<<10))
		io.Copy(io.Discard, c)
	},
	"different headers": func(c *net.TCPConn) {
		io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\n")
		for i := range 400 {
			fmt.Fprintf(c, "%d:\r\n", i)
		}
		io.WriteString(c, "\r\n")
		io.Copy(io.Discard, c)
	},
	"one line": func(c *net.TCPConn) { io.WriteString(c, "GET /"); c.Write(kib1000); io.Copy(io.Discard, c) },
	"drop by drop": func(c *net.TCPConn) {
		for _, b := range []byte("GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: " + strings.Repeat("x", 4000)) {
			if _, err := c.Write([]byte{b}); err != nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
	},
	"a body": func(c *net.TCPConn) {
		io.WriteString(c, "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
		c.Write(kib1000)
		io.Copy(io.Discard, c)
	},
	"a body that is waited for": func(c *net.TCPConn) {
		io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n")
		io.Copy(io.Discard, c)
	},
	"never reads": func(c *net.TCPConn) {
		c.SetReadBuffer(1)
		io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
		time.Sleep(10 * time.Second)
	},
	"pipelines": func(c *net.TCPConn) {
		for range 1000 {
			if _, err := io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
				return
			}
		}
		io.Copy(io.Discard, c)
	},
	"a probe": func(c *net.TCPConn) {
		io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
		io.Copy(io.Discard, c)
	},
	"TLS": func(c *net.TCPConn) {
		c.Write([]byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"))
		io.Copy(io.Discard, c)
	},
	"HTTP/2": func(c *net.TCPConn) {
		io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
		io.Copy(io.Discard, c)
	},
	"nonsense": func(c *net.TCPConn) { c.Write(bytes.Repeat([]byte{0, 255, '\n'}, 100<<10)); io.Copy(io.Discard, c) },
	"semicolons": func(c *net.TCPConn) {
		io.WriteString(c, "GET /healthz?a;b;c HTTP/1.1\r\nHost: x\r\n\r\n")
		io.Copy(io.Discard, c)
	},
}

var kib1000 = bytes.Repeat([]byte("x"), 1000<<10)

// roleCrowd is the role of a process that besieges the address in its first argument, until it is killed.
const roleCrowd = "crowd"

// besiege keeps 5,000 clients at the address, from the addresses 127.0.0.2 to 127.0.0.9. Each comes back within some
// seconds after it was thrown out. Each second it prints how often they came.
func besiege(target string) {
	address, err := net.ResolveTCPAddr("tcp", target)
	if err != nil {
		panic(err)
	}
	var ways []func(*net.TCPConn)
	for _, way := range sorted(nasty) {
		ways = append(ways, way)
	}
	var came atomic.Int64
	for i := range 5000 {
		go func() {
			local := &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+i%8))}
			for {
				time.Sleep(rand.N(4 * time.Second))
				conn, err := net.DialTCP("tcp", local, address)
				if err != nil {
					continue
				}
				came.Add(1)
				conn.SetDeadline(time.Now().Add(time.Minute))
				ways[i/8%len(ways)](conn)
				conn.Close()
			}
		}()
	}
	for range time.Tick(time.Second) {
		fmt.Println(came.Load())
	}
}

var peakLine = regexp.MustCompile(`VmHWM:\s+(\d+) kB`)

// peak is the most memory that the process had resident, in bytes.
func (p *process) peak(t *testing.T) int64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	must(t, err)
	kilobytes, err := strconv.ParseInt(string(peakLine.FindSubmatch(text)[1]), 10, 64)
	must(t, err)
	return kilobytes << 10
}

// probeEach asks /healthz twenty times a second, as kubelet does, until the context ends, and returns how long each
// answer took.
func (n *node) probeEach(ctx context.Context) (times []time.Duration) {
	client, failures := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: time.Second}, 0
	for ; ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		began := time.Now()
		response, err := client.Get("http://" + n.http + "/healthz")
		if err != nil {
			if failures++; failures == 1 {
				n.t.Errorf("/healthz does not answer within a second: %v", err)
			}
			continue
		}
		if response.Body.Close(); response.StatusCode != 200 {
			n.t.Errorf("/healthz answers %d", response.StatusCode)
		}
		times = append(times, time.Since(began))
	}
	if failures > 0 {
		n.t.Errorf("%d of %d probes failed", failures, failures+len(times))
	}
	return times
}

// Whoever can reach the port cannot end the driver, keep its probes from it or slow it down. Here those who try share
// its processors, so they get what nobody else wants, and stand still in times of peace.
func TestHTTPUnderSiege(t *testing.T) {
	const share = 64 << 20 // the driver's share of the memory limit in deploy.yaml
	n := newNode(t)
	p := n.startProcess()
	publish := func() time.Duration {
		v := n.volume()
		began := time.Now()
		must(t, v.publish())
		took := time.Since(began)
		must(t, v.unpublish())
		return took
	}
	publish()
	var came lockedBuffer
	binary, err := os.Executable()
	must(t, err)
	crowd := exec.Command("nice", "-n", "5", binary, n.http) // it comes beside busy processes too
	crowd.Env = append(os.Environ(), roleKey+"="+roleCrowd)
	crowd.Stdout, crowd.Stderr = &came, os.Stderr
	crowd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, startCommand(crowd))
	defer crowd.Wait()
	defer crowd.Process.Kill()
	eventually(t, "they come", func() bool { return strings.Contains(came.String(), "\n") })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	probes := make(chan []time.Duration, 1)
	go func() { probes <- n.probeEach(ctx) }()
	var peace, war []time.Duration
	number := func() int { // that came until now
		counts := strings.Fields(came.String())
		last, err := strconv.Atoi(counts[len(counts)-1])
		must(t, err)
		return last
	}
	for round := 0; round < times(1, 30) || number() < times(2000, 5000); round++ { // a busy machine lets fewer come
		for _, phase := range []struct {
			signal syscall.Signal
			length time.Duration
			times  *[]time.Duration
		}{{syscall.SIGSTOP, time.Second, &peace}, {syscall.SIGCONT, 2 * time.Second, &war}} {
			must(t, crowd.Process.Signal(phase.signal))
			for end := time.Now().Add(phase.length); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
				*phase.times = append(*phase.times, publish())
			}
		}
	}
	cancel()
	answered := <-probes
	slices.Sort(answered)
	slices.Sort(peace)
	slices.Sort(war)
	quiet, loud, peak := peace[len(peace)/2], war[len(war)/2], p.peak(t)
	t.Logf("%d connections; %d probes, p50 %v, at most %v; publish p50: %v (of %d) in peace, %v (of %d) in war; memory: "+
		"%d KiB",
		number(), len(answered), answered[len(answered)/2], answered[len(answered)-1],
		quiet, len(peace), loud, len(war), peak>>10)
	if peak > share {
		t.Errorf("the driver took %d KiB of memory, of the %d that it may", peak>>10, share>>10)
	}
	if longTests && loud > 2*quiet { // in seconds there may be another reason
		t.Errorf("a publish takes %v in war and %v in peace", loud, quiet)
	}
	if lines := strings.Count(p.log.String(), "\n"); lines > 2*(2+len(peace)+len(war)) {
		t.Errorf("the log has %d lines for %d publishes", lines, 1+len(peace)+len(war))
	}
}
