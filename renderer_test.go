package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ---- The renderer ----

// startedAsRenderer is what this program does where a driver has started it as a renderer. By another name than its
// own it is not the one that it should be: an impostor, or the real one with code in it that tries what it can do.
func startedAsRenderer() (exitCode int) {
	name := filepath.Base(os.Args[0])
	if i, err := strconv.Atoi(strings.TrimPrefix(name, "impostor-")); err == nil {
		return impostors()[i].serve()
	}
	if address, ok := strings.CutPrefix(name, "intruder-"); ok {
		os.Setenv(intruderKey, address) // for the second half
	}
	if address := os.Getenv(intruderKey); address != "" && os.Args[1] == serveArgument {
		requests := os.Stdin
		os.Stdin, _, _ = os.Pipe()
		go func() {
			readFrame(requests, maxFrameBytes) // by then it has given up all that it gives up
			intrude(address)
		}()
	}
	return rendererMain(os.Args[1:])
}

// children returns the processes that a process has started and not waited for, with their states.
func children(t testing.TB, parent int) map[int]string {
	t.Helper()
	found := map[int]string{}
	paths, err := filepath.Glob("/proc/[0-9]*/stat")
	must(t, err)
	for _, path := range paths {
		text, _ := os.ReadFile(path) // it may be gone
		i := bytes.LastIndexByte(text, ')')
		if f := strings.Fields(string(text[i+1:])); len(f) > 2 && f[1] == strconv.Itoa(parent) {
			pid, err := strconv.Atoi(strings.Split(path, "/")[2])
			must(t, err)
			found[pid] = f[0]
		}
	}
	return found
}

// processStatus returns a field of /proc/<pid>/status.
func processStatus(t testing.TB, pid int, field string) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			return strings.Join(strings.Fields(value), " ")
		}
	}
	t.Fatalf("/proc/%d/status has no %s", pid, field)
	return ""
}

func kilobytes(t testing.TB, pid int, field string) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSuffix(processStatus(t, pid, field), " kB"))
	must(t, err)
	return n
}

// ---- Renderers that die, and renderers that lie ----

// perhapsMounted are the codes after which kubelet takes care of a volume that may be mounted.
var perhapsMounted = []codes.Code{codes.Canceled, codes.DeadlineExceeded, codes.Unavailable, codes.ResourceExhausted,
	codes.Aborted}

func descriptors(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}

func TestRenderersKilledAtAnyMoment(t *testing.T) {
	n := startNode(t)
	n.volume().mustPublish()
	n.endRenderers()
	before, log := descriptors(t), n.logFromNow()
	var failed, ended atomic.Int32
	volumes, rounds := 8, times(2, 8)
	const wanted = 3 // publishes have failed at least
	for i := range volumes {
		v := n.pod(fmt.Sprintf("team-%d/default", i%4)).volume("config", attrs{"connector.namespace": "default"})
		go func() {
			defer ended.Add(1)
			for round := 0; round < rounds || failed.Load() < wanted; round++ {
				v.pod.renewToken()
				err := v.publish()
				for ; err != nil; err = v.publish() {
					if failed.Add(1); !slices.Contains(perhapsMounted, status.Code(err)) {
						t.Error(err)
						return
					}
				}
				if text, err := os.ReadFile(v.target + "/token"); string(text) != v.pod.token {
					t.Errorf("the file is not the token: %v", err)
				}
			}
		}()
	}
	killed := 0
	for ended.Load() < int32(volumes) {
		for _, pid := range n.renderers() {
			// Not by its number, which may be another's by now.
			p, err := os.FindProcess(pid)
			if err == nil && children(t, os.Getpid())[pid] != "" && p.Kill() == nil {
				killed++
			}
			p.Release() // its descriptor
		}
	}
	t.Logf("%d times killed, %d publishes failed", killed, failed.Load())
	// That one was killed is no sign that the kernel refuses to confine it as well as that.
	if strings.Contains(log(), "less confined") && mayChooseUser(t) {
		t.Error("a renderer was less confined than it could be")
	}
	n.endRenderers()
	if left := children(t, os.Getpid()); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
	eventually(t, fmt.Sprintf("there are %d descriptors as before", before),
		func() bool { return descriptors(t) <= before })
}

func TestRenderersEndWithTheDriver(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.api.put(class("endless", configuration("config", "file", "{{ range 9223372036854775807 }}{{ end }}")),
		connector("default", "endless", "endless"))
	p := n.startBinary(rendererBinary())
	n.volume().mustPublish()
	idle := slices.Collect(maps.Keys(children(t, p.Process.Pid)))
	p.kill()
	awaitEnd(t, idle[0])

	p = n.startBinary(rendererBinary())
	done := make(chan error)
	go func() { done <- n.volume(attrs{"connector.name": "endless"}).publish() }()
	var busy []int
	eventually(t, "a renderer is at it", func() bool {
		busy = slices.Collect(maps.Keys(children(t, p.Process.Pid)))
		return len(busy) == 1 && processorTime(t, busy[0]) > 100*time.Millisecond
	})
	p.kill()
	wantError(t, <-done, codes.Unavailable)
	awaitEnd(t, busy[0])
}

// processorTime is what a process has used, which it may have ended after.
func processorTime(t testing.TB, pid int) time.Duration {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	f := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(f) < 13 {
		return 0
	}
	user, err := strconv.Atoi(f[11])
	must(t, err)
	system, err := strconv.Atoi(f[12])
	must(t, err)
	return time.Duration(user+system) * 10 * time.Millisecond
}

// impostor is a renderer that is not to be trusted.
type impostor struct {
	what    string
	code    codes.Code
	message string // a regular expression
	answer  func(token string, write func(kind byte, content string))
}

func impostors() []impostor {
	const huge = maxVolumeBytes
	type write = func(kind byte, content string)
	return []impostor{
		{"a frame of no kind", codes.Unavailable, `unexpected frame 'X'`, func(_ string, write write) { write('X', "") }},
		{"a frame that is too long", codes.Unavailable, `a frame of 1048577 bytes`,
			func(_ string, write write) { write(frameContent, strings.Repeat("x", huge+1)) }},
		{"300 files", codes.Unavailable, `a volume may hold 1024 KiB in 256 files`, func(_ string, write write) {
			for i := range 300 {
				write(frameName, fmt.Sprint(i))
				write(frameContent, "x")
			}
			write(frameDone, "")
		}},
		{"files of 2 MiB", codes.Unavailable, `a volume may hold 1024 KiB in 256 files`, func(_ string, write write) {
			for _, name := range []string{"a", "b"} {
				write(frameName, name)
				write(frameContent, strings.Repeat("x", huge))
			}
			write(frameDone, "")
		}},
		{"the name of a link", codes.Unavailable, `a file name that is not allowed`, func(_ string, write write) {
			write(frameName, "..data")
			write(frameContent, "x")
			write(frameDone, "")
		}},
		{"a path", codes.Unavailable, `a file name that is not allowed`, func(_ string, write write) {
			write(frameName, "a/b")
			write(frameContent, "x")
			write(frameDone, "")
		}},
		{"the token as a name", codes.Unavailable, `a file name that is not allowed`, func(token string, write write) {
			write(frameName, token+token)
			write(frameContent, "x")
			write(frameDone, "")
		}},
		{"a file without a name", codes.Unavailable, `a file name that is not allowed`, func(_ string, write write) {
			write(frameContent, "x")
			write(frameDone, "")
		}},
		{"the token many times", codes.FailedPrecondition, `^(TOKEN){20}$`,
			func(token string, write write) { write(frameFailure, strings.Repeat(token, 20)) }},
		{"the token in the Pod's error", codes.InvalidArgument, `^x TOKEN$`,
			func(token string, write write) { write(framePodFailure, "x "+token) }},
		{"the token in a step", codes.Unavailable, `the renderer ended .*; its last step was the TOKEN`,
			func(token string, _ write) {
				say("the " + token)
				os.Exit(0)
			}},
		{"a long step", codes.Unavailable, `the renderer ended .*; its last step was xxx.* …$`, func(string, write) {
			say(strings.Repeat("x", huge))
			os.Exit(0)
		}},
		{"what is not UTF-8", codes.FailedPrecondition, `^\?x\?$`,
			func(_ string, write write) { write(frameFailure, "\xffx\xff") }},
		{"half an answer", codes.Unavailable, `unexpected EOF`, func(_ string, write write) {
			write(frameName, "a")
			os.Stdout.Write([]byte{frameContent, 0, 0, 0, 9, 'x'})
			os.Exit(0)
		}},
		{"no answer", codes.Unavailable, `the node is too busy: nothing had .* of processor time in 5s`,
			func(string, write) { say("nothing") }},
		{"steps without an answer", codes.FailedPrecondition, `^on and on takes more than 5s$`, func(string, write) {
			for used := time.Duration(0); used < renderProcessorTime/3; used, _ = processorClock(os.Getpid()) {
				say("on and on")
			}
		}},
		{"endless files", codes.FailedPrecondition, `^files takes more than (2s of processor time|5s)$`,
			func(_ string, write write) {
				say("files")
				for {
					write(frameName, "a")
					write(frameContent, "x")
				}
			}},
		{"no beginning", codes.Unavailable, `no renderer could be started: .*confining a renderer`, nil},
	}
}

// say says what a renderer is about to do.
func say(step string) { writeFrame(os.Stdout, frameStep, []byte(step)) }

// serve is what an impostor does in place of rendererMain.
func (i impostor) serve() (exitCode int) {
	write := func(kind byte, content string) {
		if writeFrame(os.Stdout, kind, []byte(content)) != nil {
			os.Exit(1)
		}
	}
	if i.answer == nil {
		write(frameName, "x")
		return 0
	}
	write(frameDone, "")
	_, header, _ := readFrame(os.Stdin, maxFrameBytes)
	var job jobHeader
	if json.Unmarshal(header, &job) != nil {
		return 1
	}
	i.answer(job.Token, write)
	io.Copy(io.Discard, os.Stdin) // it stays, until it is ended
	return 0
}

func TestRenderersThatCannotBeTrusted(t *testing.T) {
	t.Parallel()
	var volumes []*podVolume
	for i := range impostors() {
		volumes = append(volumes, renderedBy(t, fmt.Sprintf("impostor-%d", i)).volume())
	}
	errs := make([]error, len(volumes))
	var wait sync.WaitGroup
	for i, v := range volumes {
		wait.Go(func() { errs[i] = v.publish() })
	}
	wait.Wait()
	for i, c := range impostors() {
		t.Run(c.what, func(t *testing.T) {
			v := volumes[i]
			v.t = t
			err := errs[i]
			if c.code == codes.FailedPrecondition && status.Code(err) == codes.Unavailable &&
				strings.Contains(err.Error(), "the node is too busy") {
				t.Skip("the machine is too busy") // for it to take the time that it is refused for
			}
			wantError(t, err, c.code)
			if text := status.Convert(err).Message(); !regexp.MustCompile(c.message).MatchString(text) {
				t.Errorf("not %q, but %q", c.message, text)
			}
			v.wantNothing()
			// A failure is an answer, and no reason to end.
			p := v.node.driver.renderers
			if isAnswer := c.code == codes.InvalidArgument ||
				strings.HasPrefix(c.message, "^") && !strings.Contains(c.message, "takes"); (len(p.idle) == 1) != isAnswer {
				t.Errorf("%d renderers go on", len(p.idle))
			}
			p.close()
		})
	}
	eventually(t, "no impostor is left, of another test neither", func() bool {
		for pid := range children(t, os.Getpid()) {
			if name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); strings.HasPrefix(string(name), "impostor-") {
				return false
			}
		}
		return true
	})
}

// ---- Turns at the renderers ----

// change changes the state of the renderers, and lets in whom it lets in.
func changeRenderers(p *renderers, change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
	p.admit()
}

// awaitTurns waits until so many turns wait.
func awaitTurns(t *testing.T, q *queue, count int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d turns wait", count), func() bool {
		q.mu.Lock()
		defer q.mu.Unlock()
		return len(q.waiting) == count
	})
}

func TestFullestAccountIsNext(t *testing.T) {
	t.Parallel()
	p := newRenderers("", nil, nil)
	changeRenderers(p, func() {
		p.capacity = 0
		p.accounts["poor"] = &account{left: time.Second, at: time.Now()}
		p.accounts["rich"] = &account{left: 5 * time.Second, at: time.Now()}
		p.accounts["once-poor"] = &account{left: time.Second, at: time.Now().Add(-2 * time.Minute)} // 7 s by now
	})
	served := make(chan string)
	for i, who := range []string{"poor/1", "rich/1", "once-poor/1", "poor/2", "full/1", "rich/2", "full/2",
		"once-poor/2"} {
		go func() {
			namespace, _, _ := strings.Cut(who, "/")
			if err := p.acquire(t.Context(), &ticket{namespace: namespace, key: [32]byte{byte(i)}}); err != nil {
				t.Error(err)
			}
			served <- who
		}()
		awaitTurns(t, &p.queue, i+1)
	}
	for _, want := range []string{"full/1", "full/2", "once-poor/1", "once-poor/2", "rich/1", "rich/2", "poor/1",
		"poor/2"} {
		changeRenderers(p, func() { p.capacity++ })
		if got := <-served; got != want {
			t.Errorf("the next is %s, not %s", got, want)
		}
	}
}

// One namespace's templates have taken both renderers for a while, and more of them wait.
func TestOthersDoNotWaitForHostileVolumes(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(class("hostile", configuration("config", "file", `{{ fail "x" }}`)), connector("hostile", "git", "hostile"))
	p := n.driver.renderers
	changeRenderers(p, func() {
		p.capacity = 0
		p.accounts["hostile"] = &account{left: accountSize - 4*time.Second, at: time.Now()}
	})
	var wait sync.WaitGroup
	for i := range 10 {
		v := n.pod("hostile/default").volume("config")
		wait.Go(func() {
			wantError(t, v.publish(), codes.FailedPrecondition)
			p.mu.Lock()
			defer p.mu.Unlock()
			if slices.ContainsFunc(p.waiting, func(t *ticket) bool { return t.namespace != "hostile" }) {
				t.Error("a hostile volume has had its turn while others wait")
			}
		})
		awaitTurns(t, &p.queue, i+1)
	}
	for i := range 30 {
		v := n.pod(fmt.Sprintf("honest-%d/default", i%3)).volume("config", attrs{"connector.namespace": "default"})
		wait.Go(func() {
			if err := v.publish(); err != nil {
				t.Error(err)
			}
		})
		awaitTurns(t, &p.queue, 10+i+1)
	}
	changeRenderers(p, func() { p.capacity = maxRenderers })
	wait.Wait()
}

func TestEmptyAccount(t *testing.T) {
	n := startNode(t)
	n.api.put(class("endless", configuration("config", "file", "{{ range 9223372036854775807 }}{{ end }}"),
		configuration("good", "file", "x"),
		configuration("other", "file", "y")), connector("hungry", "git", "endless"))
	p := n.driver.renderers
	setAccount := func(left, ago time.Duration) {
		changeRenderers(p, func() {
			p.accounts["hungry"] = &account{left: left, at: time.Now().Add(-ago), most: left, mostBy: "nothing"}
		})
	}
	volume := func(names string) *podVolume {
		return n.pod("hungry/default").volume("config", attrs{"configuration.names": names})
	}
	v := volume("config")
	setAccount(time.Millisecond, 0)
	v.mustBeStopped(takesTime)

	// The next are refused at once, whatever they are, unless they are known to be cheap.
	used := `^rendering for namespace "hungry" has used up its 10s of processor time, of which 3s come back each ` +
		`minute, enough for the next try in \d+s; ` +
		`what took most, [\d.]+m?s, is ConnectorClass "endless", configuration "config", file "file": rendering it$`
	good := volume("good")
	for _, v := range []*podVolume{volume("other"), good} {
		err := v.publish()
		wantError(t, err, codes.ResourceExhausted)
		if text := status.Convert(err).Message(); !regexp.MustCompile(used).MatchString(text) {
			t.Errorf("not %q, but %q", used, text)
		}
		v.wantNothing()
	}
	n.volume().mustPublish() // of another namespace

	// It fills up again, and is forgotten when it is full.
	setAccount(-time.Second, 21*time.Second)
	good.mustPublish()
	setAccount(-time.Second, time.Hour)
	n.volume().mustPublish()
	if p.accounts["hungry"] != nil {
		t.Error("a full account is not forgotten")
	}

	// What was cheap is served while it is empty: the same for other Pods, and another token.
	setAccount(-time.Minute, 0)
	volume("good").mustPublish()
	good.pod.renewToken()
	good.mustPublish()
	volume("other").mustRefuse(codes.ResourceExhausted, "has used up")

	// It may become empty while somebody waits.
	setAccount(time.Second, 0)
	changeRenderers(p, func() { p.capacity = 0 })
	done := make(chan error)
	go func() { done <- volume("other").publish() }()
	awaitTurns(t, &p.queue, 1)
	setAccount(-time.Second, 0)
	changeRenderers(p, func() { p.capacity = maxRenderers })
	wantError(t, <-done, codes.ResourceExhausted, "has used up")
}

// What has hit a limit is not tried again at once, by no Pod of the namespace, until it or the time has changed.
func TestKnownLimitIsNotTriedAgain(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(class("large", configuration("config", "file", `{{ $x := repeat 200000000 "x" }}`)),
		connector("default", "large", "large"))
	p := n.driver.renderers
	volume := func() *podVolume { return n.volume(attrs{"connector.name": "large", "token.expiration": "1h"}) }
	limits := func() float64 { return n.readMetrics()[`connectors_csi_renderer_limits_total{limit="memory"}`] }
	volumes := make([]*podVolume, 20)
	for i := range volumes {
		volumes[i] = volume()
	}
	results := publishAtOnce(volumes)
	for range volumes {
		wantError(t, <-results, codes.FailedPrecondition, "takes more than 64 MiB of memory")
	}
	tokens := n.api.countFromNow(tokenPath("default", "default"))
	if limits() != 1 {
		t.Errorf("twenty Pods have hit the limit %v times", limits())
	}
	volume().mustRefuse(codes.FailedPrecondition,
		"takes more than 64 MiB of memory; it is tried again after 30s, or when something has changed")
	if tokens() != 0 {
		t.Error("a token was asked for that could not be used")
	}
	later := func(d time.Duration) {
		changeRenderers(p, func() {
			for what, o := range p.outcomes {
				o.at = o.at.Add(-d)
				p.outcomes[what] = o
			}
		})
	}
	for i, pause := range []string{"1m0s", "2m0s", "4m0s", "8m0s", "10m0s", "10m0s"} {
		later(10 * time.Minute)
		volume().mustRefuse(codes.FailedPrecondition, "takes more than 64 MiB of memory")
		volume().mustRefuse(codes.FailedPrecondition, "it is tried again after "+pause)
		if int(limits()) != i+2 {
			t.Errorf("the limit was hit %v times", limits())
		}
	}
	v := volume()
	n.api.put(class("large", configuration("config", "file", "small")))
	v.mustPublish()
	v.want("file", "small")
}

// What is remembered is bounded, and one namespace's does not displace another's.
func TestOutcomesAreBounded(t *testing.T) {
	t.Parallel()
	p := newRenderers("", nil, nil)
	what := func(namespace, number int) (key [32]byte) {
		key[0], key[1], key[2] = byte(namespace), byte(number>>8), byte(number)
		return key
	}
	for namespace := range 40 {
		for number := range 70 {
			p.remember(what(namespace, number), outcome{namespace: fmt.Sprint(namespace), at: time.Now()})
		}
	}
	count := map[string]int{}
	for _, o := range p.outcomes {
		count[o.namespace]++
	}
	if len(p.outcomes) != 1024 || count["39"] != 64 || count["0"] != 0 {
		t.Errorf("%d outcomes: %v", len(p.outcomes), count)
	}
	for _, number := range []int{0, 5} {
		if _, kept := p.outcomes[what(39, number)]; kept {
			t.Errorf("the outcome %d is kept", number)
		}
	}
	if _, kept := p.outcomes[what(39, 69)]; !kept {
		t.Error("the newest is gone")
	}
}

func TestRenderersAreUsedAgain(t *testing.T) {
	n := startNode(t)
	n.api.put(class("bad", configuration("config", "file", `{{ .none }}`)), connector("a", "git", "git"),
		connector("a", "bad", "bad"))
	publish := func(namespace string) (all []int) {
		t.Helper()
		n.pod(namespace+"/default").volume("config", attrs{"connector.namespace": "default"}).mustPublish()
		return n.renderers()
	}
	other := func(all []int, but int) int { return all[1-slices.Index(all, but)] }
	first := publish("a")
	if len(first) != 1 {
		t.Fatalf("renderers %v", first)
	}
	a := first[0]
	for range 3 {
		n.pod("a/default").volume("config", attrs{"connector.name": "bad"}).mustRefuse(codes.FailedPrecondition,
			"has no value")
		if again := publish("a"); !slices.Equal(again, first) {
			t.Errorf("for the same namespace, and after a failure, there is %v, not %v", again, first)
		}
	}
	two := publish("b")
	if len(two) != 2 || !slices.Contains(two, a) {
		t.Fatalf("for another namespace there are %v, not %d and one more", two, a)
	}
	b := other(two, a)
	if again := publish("a"); !slices.Equal(again, two) {
		t.Errorf("%v, not %v", again, two)
	}
	three := publish("c") // in the place of b, which is the longest idle
	if len(three) != 2 || !slices.Contains(three, a) || slices.Contains(three, b) {
		t.Fatalf("for a third namespace there are %v, not %d and another one than %d", three, a, b)
	}
	var all sync.WaitGroup
	for i := range 40 {
		v := n.pod(fmt.Sprintf("team-%d/default", i%5)).volume("config", attrs{"connector.namespace": "default"})
		all.Go(func() {
			if err := v.publish(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	p := n.driver.renderers
	if len(n.renderers()) != maxRenderers || len(p.idle) != maxRenderers || len(p.active) != 0 || len(p.waiting) != 0 {
		t.Errorf("renderers %v, idle %d, at it %d, waiting %d", n.renderers(), len(p.idle), len(p.active), len(p.waiting))
	}
	for _, r := range slices.Clone(p.idle) {
		p.retire(r)
		p.retire(r) // by its timer, at the same moment
	}
	if left := n.renderers(); len(left) > 0 {
		t.Errorf("%v are left", left)
	}
	publish("a")
}

// A caller who gives up leaves its place in the line, or ends its renderer.
func TestCallersThatGiveUpRendering(t *testing.T) {
	n := startNode(t)
	n.api.put(class("endless", configuration("config", "file", "{{ range 9223372036854775807 }}{{ end }}")),
		connector("default", "endless", "endless"))
	p := n.driver.renderers
	publish := func() (giveUp func()) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		v := n.volume(attrs{"connector.name": "endless"})
		go func() {
			_, err := csi.NewNodeClient(n.conn).NodePublishVolume(ctx, v.request())
			done <- err
		}()
		return func() {
			t.Helper()
			cancel()
			wantError(t, <-done, codes.Canceled)
			n.awaitCalls(0)
			v.wantNothing()
		}
	}
	changeRenderers(p, func() { p.capacity = 0 })
	giveUp := publish()
	awaitTurns(t, &p.queue, 1)
	giveUp()
	awaitTurns(t, &p.queue, 0)
	changeRenderers(p, func() { p.capacity = maxRenderers })

	giveUp = publish()
	eventually(t, "a renderer is at it", func() bool {
		r := n.renderers()
		return len(r) == 1 &&
			processorTime(t, r[0]) > 0
	})
	giveUp()
	if left := n.renderers(); len(left) > 0 || len(p.active) != 0 || p.accounts["default"] == nil {
		t.Errorf("renderers %v, at it %d, accounts %v", left, len(p.active), p.accounts)
	}
	n.volume().mustPublish()
}

// What made one confinement fail once is no reason for less confinement than there was.
func TestConfinementNeverWeakens(t *testing.T) {
	p := newRenderers(rendererBinary(), slog.New(slog.DiscardHandler), newMetrics(nil))
	r, err := p.start("default")
	must(t, err)
	r.end()
	all := confinements
	t.Cleanup(func() { confinements = all })
	confinements = slices.Clone(all)
	confinements[p.best].flags = unix.CLONE_NEWUSER
	confinements[p.best].uid = -1 // which the kernel refuses
	if r, err := p.start("default"); err == nil {
		r.end()
		t.Errorf("a renderer is less confined (%d) than one before", p.best)
	}
	confinements = all
	r, err = p.start("default")
	must(t, err)
	r.end()
}
