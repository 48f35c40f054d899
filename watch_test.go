package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

// ---- Watches and pushes ----

// A change of any object reaches the files of its volumes without a call of kubelet: of a Connector, of its status,
// and of its class.
func TestChangesArePushed(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	volumes := []*podVolume{n.volume(), n.volume(), n.pod("default/builder").volume("config")}
	for _, v := range volumes {
		v.settle()
	}
	n.api.awaitStreams(3) // two readers of the Connector, and the driver's of the class
	await := func(file, content string) {
		t.Helper()
		for _, v := range volumes {
			v.await(file, content)
			v.want("token", v.pod.token)
		}
	}
	n.api.put(connector("default", "git", "git", with("https://changed", "spec", "address")))
	await(".gitconfig", "https://changed")
	n.api.put(connector("default", "git", "git", with("https://proxy", "status", "proxy", "httpAddress", "url")))
	await(".gitconfig", "https://proxy")
	n.api.put(gitClassOf("token", "{{ .context.token }}", "new", "of the class"))
	await("new", "of the class")
}

// There is one stream for each reader and object, whatever the number of volumes, and none when they are gone.
func TestStreamsAreShared(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(connector("default", "other", "git"))
	pod := n.pod()
	volumes := []*podVolume{pod.volume("a"), pod.volume("b"), n.volume(), n.volume(attrs{"connector.name": "other"}),
		n.pod("default/builder").volume("config")}
	for _, v := range volumes {
		v.settle()
	}
	n.api.awaitStreams(4)
	git := n.api.stream("default/default", connectorPath("default", "git"))
	n.api.stream("default/default", connectorPath("default", "other"))
	n.api.stream("default/builder", connectorPath("default", "git"))
	class := n.api.stream(driverUser, classPath("git"))
	for _, s := range []*apiStream{git, class} {
		if !s.metadataOnly || s.version != "" || s.seconds < 1500 || s.seconds > 1800 {
			t.Errorf("a watch is %+v", s.watchRequest)
		}
	}
	volumes[0].mustUnpublish()
	volumes[1].mustUnpublish()
	volumes[3].mustUnpublish()
	n.api.awaitStreams(3)
	volumes[4].mustUnpublish()
	n.api.awaitStreams(2)
	volumes[2].mustUnpublish()
	n.api.awaitStreams(0)
	eventually(t, "no stream counts", func() bool { return n.readMetrics()["connectors_csi_watches"] == 0 })
}

func TestNothingIsReadWhileNothingChanges(t *testing.T) {
	t.Parallel()
	n := startNode(t, func(d *driver) { d.kube.refresh = time.Nanosecond }) // without a stream each call would read
	v := n.volume()
	v.settle()
	n.api.awaitStreams(2)
	// What was read before its stream was open is read once more.
	eventually(t, "a call asks nobody", func() bool {
		asked := n.api.countFromNow("")
		v.mustPublish()
		return asked() == 0
	})
	asked := n.api.countFromNow("")
	for range 20 {
		n.api.stream("default/default", connectorPath("default", "git")).bookmark()
		v.mustPublish()
		v.pod.renewToken()
		v.mustPublish()
		v.want("token", v.pod.token)
	}
	if got := asked(); got != 0 {
		t.Errorf("%d requests", got)
	}
}

// moved makes a Connector with another address.
func moved(name, address string) object {
	return connector("default", name, "git", with("https://"+address, "spec", "address"))
}

// await waits until the text is in a file of the volume.
func (v *podVolume) await(name, text string) {
	v.t.Helper()
	eventually(v.t, fmt.Sprintf("%s of %s has %q", name, v.target, text), func() bool {
		content, _ := os.ReadFile(filepath.Join(v.target, name))
		return strings.Contains(string(content), text)
	})
}

// awaitMetric waits until the metric has at least the value.
func (n *node) awaitMetric(sample string, value float64) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("%s is %v", sample, value), func() bool { return n.readMetrics()[sample] >= value })
}

// awaitWatches waits until so many streams are open on both sides, so that what is read no more is known.
func (n *node) awaitWatches(count int) {
	n.t.Helper()
	n.api.awaitStreams(count)
	eventually(n.t, fmt.Sprintf("the driver counts %d watches", count), func() bool {
		return n.readMetrics()["connectors_csi_watches"] == float64(count)
	})
}

// watchedVolume makes a volume that is settled and whose objects are watched, as the only one of its node.
func (n *node) watchedVolume(attributes ...attrs) *podVolume {
	n.t.Helper()
	v := n.volume(attributes...)
	v.settle()
	n.awaitWatches(2)
	return v
}

var (
	gitPath  = connectorPath("default", "git")
	pushedOK = `connectors_csi_pushes_total{code="OK"}`
	anHour   = "--refresh-interval=1h"
)

// wantForgotten makes sure that the driver keeps nothing of volumes, when all are gone: no stream, no entry, and no
// goroutine that it has started for one.
func (n *node) wantForgotten() {
	n.t.Helper()
	n.awaitWatches(0)
	d, k, left := n.driver, n.driver.kube, ""
	defer func() {
		if n.t.Failed() {
			n.t.Log("left of the volumes:", left)
		}
	}()
	eventually(n.t, "the driver has forgotten all volumes", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		k.mu.Lock()
		defer k.mu.Unlock()
		stacks := make([]byte, 4<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		for _, s := range strings.Split(string(stacks), "\n\n") {
			if strings.Contains(s, fmt.Sprintf("(*kube).follow(%p", k)) {
				left = s
				return false
			}
		}
		using := 0
		for e := range k.allEntries {
			using += len(e.subscriptions) + e.lookups
		}
		left = fmt.Sprint(d.volumes, d.kept, k.watches, using, k.charged)
		return len(d.volumes)+d.kept[""]+len(k.watches)+using+len(k.charged)+len(k.entries) == 0
	})
}

// Whatever comes over a stream, and however it ends: the file stays as it is, and the next change reaches it.
func TestWhateverAStreamSays(t *testing.T) {
	t.Parallel()
	event := func(kind, name, uid string, version int) string {
		return fmt.Sprintf(`{"type":%q,"object":{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1",`+
			`"metadata":{"name":%q,"namespace":"default","uid":%q,"resourceVersion":"%d"}}}`, kind, name, uid, version) + "\n"
	}
	status := func(code int, reason string) string {
		return fmt.Sprintf(`{"type":"ERROR","object":%s}`, statusBody(code, reason, "no")) + "\n"
	}
	cases := map[string]struct {
		text string
		end  string // how the stream ends after it, if it does
	}{
		"end":                        {"", "end"},
		"abort":                      {"", "abort"},
		"half a line, then the end":  {`{"type":"MODIFIED","obj`, "end"},
		"half a line, then an abort": {`{"type":"MODIFIED","obj`, "abort"},
		"a line without its newline": {strings.TrimSpace(event("MODIFIED", "x", "y", 1)), "end"},
		"the end in a huge line":     {strings.Repeat("x", 1<<20), "end"},
		"a huge line":                {event("MODIFIED", strings.Repeat("x", 1<<20), "y", 1), ""},
		"a huge line without end":    {strings.Repeat("x", 1<<20), ""},
		"a huge line of brackets":    {strings.Repeat("[", 1<<20) + "\n", ""},
		"not JSON":                   {"<html>\n", ""},
		"empty lines":                {"\n\n\r\n", ""},
		"null":                       {"null\n", ""},
		"a list":                     {"[]\n", ""},
		"nothing":                    {"{}\n", ""},
		"no object":                  {`{"type":"MODIFIED"}` + "\n", ""},
		"an object without metadata": {`{"type":"MODIFIED","object":{}}` + "\n", ""},
		"another type":               {event("RENAMED", "x", "y", 1), ""},
		"wrong types":                {`{"type":7,"object":"x"}` + "\n", ""},
		"another object":             {event("MODIFIED", "another", "uid-1", 1<<40), ""},
		"an old version":             {event("MODIFIED", "git", "uid-1", 1), ""},
		"DELETED, which is not so":   {event("DELETED", "git", "uid-1", 1<<40), ""},
		"a bookmark":                 {event("BOOKMARK", "", "", 1), ""},
		"a bookmark and the end":     {event("BOOKMARK", "", "", 1), "end"},
		"a bookmark without version": {`{"type":"BOOKMARK","object":{"metadata":{}}}` + "\n", "end"},
		"a version that is no number": {`{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"a&b=c d"}}}` + "\n",
			"end"},
		"410":                     {status(410, "Expired"), ""},
		"410 and the end":         {status(410, "Expired"), "end"},
		"500":                     {status(500, "InternalError"), ""},
		"401":                     {status(401, "Unauthorized"), "end"},
		"an error without status": {`{"type":"ERROR"}` + "\n", ""},
	}
	n := startNode(t)
	volumes, i := map[string]*podVolume{}, 0
	for what := range cases {
		i++
		name := fmt.Sprintf("case-%d", i)
		n.api.put(connector("default", name, "git"))
		volumes[what] = n.volume(attrs{"connector.name": name})
		volumes[what].settle()
	}
	n.awaitWatches(len(cases) + 1)
	generations := map[string]uint64{}
	for what, c := range cases {
		generations[what] = volumes[what].generation()
		s := n.api.stream("default/default", connectorPath("default", volumes[what].attributes["connector.name"]))
		s.send(c.text)
		if c.end != "" {
			s.close(c.end == "abort")
		}
	}
	for what, v := range volumes {
		v.mustPublish()
		if v.generation() != generations[what] {
			t.Errorf("%s: it has written what was there already", what)
		}
		n.api.put(moved(v.attributes["connector.name"], "changed"))
	}
	for what, v := range volumes {
		t.Run(what, func(t *testing.T) {
			v.t = t
			v.await(".gitconfig", "https://changed")
			v.mustUnpublish()
		})
	}
	n.wantForgotten()
}

// kubectl apply leaves the whole object in an annotation: an event can be larger than what is looked into, and says
// that something has changed all the same, on a stream that goes on.
func TestEventsWithLargeAnnotations(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	annotated := with(strings.Repeat("x", 100<<10), "metadata", "annotations",
		"kubectl.kubernetes.io/last-applied-configuration")
	put := func(i int) {
		n.api.put(connector("default", "git", "git", annotated, with(fmt.Sprintf("https://large-%d", i), "spec", "address")))
	}
	put(0)
	v := n.watchedVolume()
	for i := range 3 {
		put(i + 1)
		v.await(".gitconfig", fmt.Sprintf("https://large-%d", i+1))
	}
	watches := `connectors_csi_api_requests_total{resource="connectors",verb="watch",code="200"}`
	if opened := n.readMetrics()[watches]; opened != 1 {
		t.Errorf("the Connector's watch was opened %v times", opened)
	}
}

// Where the API server does not open streams, objects are polled, and it is not asked again and again.
func TestWatchesThatAreRefused(t *testing.T) {
	t.Parallel()
	thief := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("somebody else has got %s %s", r.Method, r.URL)
	}))
	defer thief.Close()
	answer := func(code int, body string, header ...string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) {
			for pair := range slices.Chunk(header, 2) {
				w.Header().Set(pair[0], pair[1])
			}
			w.WriteHeader(code)
			io.WriteString(w, body)
		}
	}
	never := make(chan struct{})
	defer close(never)
	wait := func(r *http.Request) {
		select {
		case <-never:
		case <-r.Context().Done():
		}
	}
	cases := map[string]func(http.ResponseWriter, *http.Request){
		"401":            answer(401, statusBody(401, "Unauthorized", "Unauthorized")),
		"403":            answer(403, statusBody(403, "Forbidden", "no")),
		"404":            answer(404, statusBody(404, "NotFound", "no")),
		"410":            answer(410, statusBody(410, "Expired", "no")),
		"429":            answer(429, statusBody(429, "TooManyRequests", "later"), "Retry-After", "3600"),
		"429 at once":    answer(429, statusBody(429, "TooManyRequests", "now"), "Retry-After", "0"),
		"500":            answer(500, "a proxy's page"),
		"503":            answer(503, ""),
		"redirect":       answer(307, "", "Location", thief.URL+"/x"),
		"HTML":           answer(200, "<html>\n<body>\n</html>\n", "Content-Type", "text/html"),
		"a list":         answer(200, `{"kind":"ConnectorList","items":[]}`),
		"nothing":        answer(200, ""),
		"no content":     answer(204, ""),
		"a huge failure": answer(400, strings.Repeat("x", 8<<20)),
		"dies":           func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"silence":        func(_ http.ResponseWriter, r *http.Request) { wait(r) },
		"opens, then says nothing": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(200)
			http.NewResponseController(w).Flush()
			wait(r)
		},
	}
	n := newNode(t)
	byName, i := map[string]func(http.ResponseWriter, *http.Request){}, 0
	n.api.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		name, _ := strings.CutPrefix(r.URL.Query().Get("fieldSelector"), "metadata.name=")
		if byName[name] == nil {
			return false
		}
		byName[name](w, r)
		return true
	}
	names := map[string]string{}
	for what, answer := range cases {
		i++
		names[what] = fmt.Sprintf("case-%d", i)
		byName[names[what]] = answer
	}
	n.start(func(d *driver) { d.kube.refresh = time.Nanosecond })
	began, volumes := time.Now(), map[string]*podVolume{}
	for what, name := range names {
		n.api.put(connector("default", name, "git"))
		volumes[what] = n.volume(attrs{"connector.name": name})
		volumes[what].settle()
	}
	for what, name := range names {
		eventually(t, what+": a stream was tried",
			func() bool { return len(n.api.watched(connectorPath("default", name))) > 0 })
		n.api.put(moved(name, "polled"))
		volumes[what].mustPublish()
		volumes[what].await(".gitconfig", "https://polled")
	}
	n.awaitWatches(1) // of the class
	for what, name := range names {
		tries := len(n.api.watched(connectorPath("default", name)))
		if limit := 6 + int(time.Since(began)/time.Second); tries > limit {
			t.Errorf("%s: %d tries in %v", what, tries, time.Since(began))
		}
		volumes[what].mustUnpublish()
	}
	n.wantForgotten()
}

// A stream that ended goes on from its last event or bookmark; only one that the API server cannot continue begins
// with the object as it is. Nothing is read for that if nothing has changed.
func TestStreamsGoOnWhereTheyEnded(t *testing.T) {
	t.Parallel()
	for what, c := range sorted(map[string]struct {
		before func(n *node) // the stream ends
		want   []string      // the resourceVersions from which it is tried to go on
	}{
		"an event":   {func(n *node) {}, []string{"changed"}},
		"a bookmark": {func(n *node) { n.api.stream("default/default", gitPath).bookmark() }, []string{"last"}},
		"too old":    {func(n *node) { n.api.forgetHistory() }, []string{"changed", ""}},
		"too old for the server's first answer": {func(n *node) {
			n.api.answer("resourceVersion=", http.StatusGone, statusBody(410, "Expired", "too old resource version"))
		}, []string{"changed", ""}},
		"a restart": {func(n *node) { n.api.restart() }, []string{"changed", ""}},
	}) {
		t.Run(what, func(t *testing.T) {
			n := startNode(t)
			v := n.watchedVolume()
			n.api.put(moved("git", "changed"))
			v.await(".gitconfig", "https://changed")
			versions := map[string]string{"changed": strconv.Itoa(n.api.version), "": ""}
			n.api.put(connector("default", "other", "git")) // the server's version is a later one
			versions["last"] = strconv.Itoa(n.api.version)
			v.mustPublish()
			asked, wantUnchanged, tried := n.api.countFromNow(""), v.unchangedFromNow(), len(n.api.watched(gitPath))
			c.before(n)
			n.api.set(func() {
				for s := range n.api.streams {
					s.end()
				}
			})
			eventually(t, "it is tried to go on", func() bool { return len(n.api.watched(gitPath)) == tried+len(c.want) })
			n.awaitWatches(2)
			for i, w := range n.api.watched(gitPath)[tried:] {
				if w.version != versions[c.want[i]] {
					t.Errorf("it goes on from %q, not %s (%q)", w.version, c.want[i], versions[c.want[i]])
				}
			}
			v.mustPublish()
			wantUnchanged()
			if got := asked(); got != 0 {
				t.Errorf("%d reads of what has not changed", got)
			}
		})
	}
}

// What changes between the read and the beginning of the stream, or while there is none, is not lost.
func TestChangesWithoutAStream(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	gate := n.api.hold("watch=1")
	v := n.volume()
	v.settle()
	gate.await(2, "the driver tries to watch")
	n.api.put(moved("git", "before-the-stream"))
	gate.open()
	v.await(".gitconfig", "https://before-the-stream")
	for _, abort := range []bool{true, false} {
		n.awaitWatches(2)
		n.api.stream("default/default", gitPath).close(abort)
		n.api.put(moved("git", fmt.Sprint("after-it-", abort)))
		v.await(".gitconfig", fmt.Sprint("https://after-it-", abort))
	}
}

// What changes while the API server is away arrives without a call of kubelet.
func TestAPIServerAway(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume()
	n.api.Close()
	n.awaitMetric(`connectors_csi_api_requests_total{resource="connectors",verb="watch",code="none"}`, 1)
	n.api.put(moved("git", "while-it-was-away"))
	v.pod.renewToken()
	v.mustPublish() // what was read is young enough
	v.want("token", v.pod.token)
	n.api.restart()
	v.await(".gitconfig", "https://while-it-was-away")
	n.awaitWatches(2)
}

// A change that could not be read is not forgotten when the stream has to begin again.
func TestChangeThatCouldNotBeRead(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume()
	n.api.answer("/connectors/git", 500, statusBody(500, "InternalError", "etcd is gone"))
	n.api.put(moved("git", "changed"))
	n.awaitMetric(`connectors_csi_pushes_total{code="Unavailable"}`, 1)
	n.api.Close()
	n.api.answer("", 0, "")
	n.api.restart()
	v.await(".gitconfig", "https://changed")
}

// Nor is it when the stream is not opened again: kubelet's next call reads it, however young the last read is.
func TestChangeThatCouldNotBeReadBeforeItsStreamEnded(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume()
	n.api.answer("/connectors/git", 500, statusBody(500, "InternalError", "etcd is gone"))
	n.api.put(moved("git", "changed"))
	n.awaitMetric(`connectors_csi_pushes_total{code="Unavailable"}`, 1)
	n.api.forbid("default/default", "watch "+gitPath)
	n.api.stream("default/default", gitPath).close(false)
	n.awaitMetric(`connectors_csi_api_requests_total{resource="connectors",verb="watch",code="403"}`, 1)
	n.api.answer("", 0, "")
	v.mustPublish()
	if got := v.file(".gitconfig"); !strings.Contains(got, "https://changed") {
		t.Errorf("the file is %q", got)
	}
}

// A first publish has nothing that was read before it began, whatever happens to streams meanwhile.
func TestFirstPublishWhileAStreamEnds(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.watchedVolume()
	n.api.put(connector("default", "other", "git"))
	gate := n.api.hold(connectorPath("default", "other"))
	v, published := n.volume(attrs{"connector.name": "other"}), make(chan error)
	go func() { published <- v.publish() }()
	gate.await(1, "the publish reads its Connector")
	n.api.forbid(driverUser, "watch "+classPath("git"))
	n.api.stream(driverUser, classPath("git")).close(false)
	n.awaitMetric(`connectors_csi_api_requests_total{resource="connectorclasses",verb="watch",code="403"}`, 1)
	n.api.put(gitClassOf("new", "changed"))
	gate.open()
	must(t, <-published)
	v.want("new", "changed")
}

// A push that fails is logged and counted, kubelet's next call says the same, and the files stay. The next change is
// tried again.
func TestFailedPush(t *testing.T) {
	t.Parallel()
	for code, c := range sorted(map[codes.Code]struct {
		words string
		fail  func(*apiServer)
	}{
		codes.FailedPrecondition: {"none", func(a *apiServer) { a.put(gitClassOf("token", "{{ .connector.spec.none }}")) }},
		codes.InvalidArgument:    {"configuration", func(a *apiServer) { a.put(class("git", configuration("other"))) }},
		codes.NotFound:           {"not found", func(a *apiServer) { a.remove(gitPath) }},
	}) {
		t.Run(code.String(), func(t *testing.T) {
			n := startNode(t)
			v := n.watchedVolume()
			log, wantUnchanged := n.logFromNow(), v.unchangedFromNow()
			c.fail(n.api)
			n.awaitMetric(fmt.Sprintf(`connectors_csi_pushes_total{code=%q}`, code), 1)
			line := regexp.MustCompile(`level=ERROR msg=push pod=default/` + v.pod.name + ` .*code=` + code.String() + ` .*` +
				c.words)
			eventually(t, "the failure is logged", func() bool { return line.MatchString(log()) })
			wantError(t, v.publish(), code, c.words)
			wantUnchanged()
			n.api.put(gitClass(), moved("git", "repaired"))
			v.await(".gitconfig", "https://repaired")
			n.awaitWatches(2)
		})
	}
}

// A volume that cannot be pushed waits 2, 4 and more seconds between two tries.
func TestPushesThatFailBecomeRarer(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume()
	var failed []time.Time
	for i := range 3 {
		n.api.put(gitClassOf("token", fmt.Sprintf("{{ .connector.spec.none%d }}", i)))
		n.awaitMetric(`connectors_csi_pushes_total{code="FailedPrecondition"}`, float64(i+1))
		failed = append(failed, time.Now())
	}
	if all := failed[2].Sub(failed[0]); all < 4*time.Second { // 2 and 4, less what the first took longer
		t.Errorf("three pushes failed within %v", all)
	}
	n.api.put(gitClass(), moved("git", "repaired"))
	eventually(t, "a call of kubelet, which waits for no push, succeeds", func() bool { return v.publish() == nil })
	v.await(".gitconfig", "https://repaired")
}

func TestConnectorMadeAgainAtOnce(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume()
	n.api.remove(gitPath)
	n.api.put(moved("git", "another"))
	v.await(".gitconfig", "https://another")
	n.api.put(moved("git", "changed"))
	v.await(".gitconfig", "https://changed")
}

// A stream that begins without the object says by its first bookmark that there is none.
func TestConnectorThatIsGoneWhenItsStreamBegins(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume()
	old := n.api.stream("default/default", gitPath)
	n.api.set(func() { delete(n.api.objects, gitPath) }) // as while the API server forgets what has happened
	old.send(`{"type":"ERROR","object":` + statusBody(http.StatusGone, "Expired", "too old") + "}\n")
	var begun *apiStream
	eventually(t, "another stream has begun", func() bool {
		begun = n.api.stream("default/default", gitPath)
		return begun != old
	})
	begun.send(`{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"1000"}}}` + "\n")
	n.awaitMetric(`connectors_csi_pushes_total{code="NotFound"}`, 1)
	wantError(t, v.publish(), codes.NotFound, "not found")
}

// When a Connector gets another class, that one is watched, and the old one no longer once nobody uses it.
func TestConnectorGetsAnotherClass(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(connector("default", "other", "git"), class("new", configuration("config", "file", "of the new class")))
	v, w := n.volume(), n.volume(attrs{"connector.name": "other"})
	v.settle()
	w.settle()
	n.awaitWatches(3)
	n.api.put(connector("default", "git", "new"))
	v.await("file", "of the new class")
	n.awaitWatches(4)
	n.api.put(class("new", configuration("config", "file", "changed")))
	v.await("file", "changed")
	n.api.put(connector("default", "other", "new"))
	w.await("file", "changed")
	n.awaitWatches(3)
	n.api.stream(driverUser, classPath("new"))
}

// What a ServiceAccount may no longer read does not reach its files, though its stream goes on; and others are not
// concerned.
func TestPermissionTakenAwayFromAStream(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v, w := n.volume(), n.pod("default/builder").volume("config")
	v.settle()
	w.settle()
	n.awaitWatches(3)
	n.api.forbid("default/default", gitPath)
	for i := range 2 {
		secret := fmt.Sprintf("secret-%d", i)
		n.api.put(moved("git", secret))
		w.await(".gitconfig", secret)
		n.awaitMetric(`connectors_csi_pushes_total{code="PermissionDenied"}`, float64(i+1))
		wantError(t, v.publish(), codes.PermissionDenied, "may not read")
		if strings.Contains(v.file(".gitconfig"), "secret") {
			t.Fatalf("the file is %q", v.file(".gitconfig"))
		}
	}
	n.api.allow("default/default", gitPath)
	v.mustPublish()
	v.await(".gitconfig", "https://secret-1")
	n.api.put(moved("git", "allowed"))
	v.await(".gitconfig", "https://allowed")
}

// With a role that has get only, objects are polled, which is said once. With the next token it is tried again.
func TestRoleWithoutWatch(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.api.forbid("default/default", "watch "+gitPath)
	n.start(func(d *driver) { d.kube.refresh = time.Nanosecond })
	log, refused := n.logFromNow(), `connectors_csi_api_requests_total{resource="connectors",verb="watch",code="403"}`
	v := n.volume()
	for i := range 3 {
		v.pod.renewToken()
		v.settle()
		n.awaitMetric(refused, float64(i+1))
	}
	lines := regexp.MustCompile(`level=WARN .*`+gitPath+`.*default/default`).FindAllString(log(), -1)
	if len(lines) != 1 || !strings.Contains(lines[0], "watch") {
		t.Errorf("the log has %q", lines)
	}
	n.api.put(moved("git", "polled"))
	v.mustPublish()
	v.await(".gitconfig", "https://polled")
	n.api.allow("default/default", "watch "+gitPath)
	v.pod.renewToken()
	v.mustPublish()
	n.awaitWatches(2)
	n.api.put(moved("git", "pushed"))
	v.await(".gitconfig", "https://pushed")
}

// An API server that has just started knows no roles yet and refuses everything. That is no reason to poll for minutes.
func TestWatchThatIsRefusedOnce(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	log, v, w := n.logFromNow(), n.volume(), n.volume()
	v.settle()
	w.settle() // whose token is another, and no reason to try again at once
	n.awaitWatches(2)
	n.api.forbid("default/default", "watch "+gitPath)
	n.api.stream("default/default", gitPath).close(false)
	n.awaitMetric(`connectors_csi_api_requests_total{resource="connectors",verb="watch",code="403"}`, 1)
	n.api.allow("default/default", "watch "+gitPath)
	n.awaitWatches(2)
	n.api.put(moved("git", "pushed"))
	v.await(".gitconfig", "https://pushed")
	if strings.Contains(log(), "polled") {
		t.Error("the log says that the object is polled")
	}
}

// Where it is the driver's role that has get only, the tokens of Pods are no reason to try again.
func TestDriversRoleWithoutWatch(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.api.forbid(driverUser, "watch "+classPath("git"))
	n.start(func(d *driver) { d.kube.refresh = time.Nanosecond })
	v := n.volume()
	for range 3 {
		v.pod.renewToken()
		v.settle()
		n.awaitMetric(`connectors_csi_api_requests_total{resource="connectorclasses",verb="watch",code="403"}`, 1)
	}
	n.api.put(gitClassOf("polled", "yes"))
	v.mustPublish()
	v.want("polled", "yes")
	v.mustUnpublish()
	n.wantForgotten()
	if tries := len(n.api.watched(classPath("git"))); tries > 2 { // the second after some seconds
		t.Errorf("%d tries to watch the class", tries)
	}
}

// endTokens makes the API server refuse the tokens that the Pods have.
func (a *apiServer) endTokens(pods ...*testPod) {
	a.set(func() {
		for _, p := range pods {
			a.ended[p.token] = true
		}
	})
}

// When the Pod is deleted that brought the newest token, the others of its ServiceAccount go on with theirs.
func TestPodOfTheNewestTokenIsDeleted(t *testing.T) {
	t.Parallel()
	for _, unpublished := range []bool{true, false} {
		t.Run(fmt.Sprintf("its volume is unpublished: %v", unpublished), func(t *testing.T) {
			n := startNode(t)
			v := n.watchedVolume()
			w := n.volume()
			w.settle()
			n.api.endTokens(w.pod)
			if unpublished {
				w.mustUnpublish()
			}
			n.api.put(moved("git", "changed"))
			v.await(".gitconfig", "https://changed")
			n.api.stream("default/default", gitPath).close(false)
			n.awaitWatches(2)
			if token := n.api.stream("default/default", gitPath).token; token != v.pod.token {
				t.Error("the stream has another token than that of the Pod which is left")
			}
			n.api.put(moved("git", "changed-again"))
			v.await(".gitconfig", "https://changed-again")
		})
	}
}

// A ServiceAccount that is deleted and made again has new tokens, with which all goes on.
func TestServiceAccountMadeAgain(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v, w := n.volume(), n.volume()
	v.settle()
	w.settle()
	n.awaitWatches(2)
	n.api.endTokens(v.pod, w.pod)
	n.api.put(moved("git", "nobody-may-read-it"))
	n.awaitMetric(`connectors_csi_pushes_total{code="Unauthenticated"}`, 2)
	for _, v := range []*podVolume{v, w} {
		wantError(t, v.publish(), codes.Unauthenticated)
		if strings.Contains(v.file(".gitconfig"), "nobody-may-read-it") {
			t.Error("it has read with a token that has ended")
		}
	}
	n.api.stream("default/default", gitPath).close(false)
	n.awaitWatches(1)
	v.pod.renewToken()
	v.mustPublish()
	v.await(".gitconfig", "https://nobody-may-read-it")
	n.awaitWatches(2)
	w.pod.renewToken()
	w.mustPublish()
	w.await(".gitconfig", "https://nobody-may-read-it")
	n.api.put(moved("git", "changed"))
	v.await(".gitconfig", "https://changed")
	w.await(".gitconfig", "https://changed")
}

// The driver's own token ends and is replaced in its file: classes are watched with the new one.
func TestDriversTokenOfAStream(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume()
	class := n.api.stream(driverUser, classPath("git"))
	n.api.set(func() { n.api.ended[class.token] = true })
	must(t, os.WriteFile(n.serviceAccount()+"/token", []byte(driverToken()), 0o600))
	class.close(false)
	n.awaitWatches(2)
	if n.api.stream(driverUser, classPath("git")).token == class.token {
		t.Error("the stream has the old token")
	}
	n.api.put(gitClassOf("new", "changed"))
	v.await("new", "changed")
}

// A node has at most 256 streams, and 64 for the Pods of a namespace. What is beyond is polled, until there is room.
func TestMoreObjectsThanStreams(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(gitClassOf("all", "{{ range .connectors }}{{ .spec.address }} {{ end }}"))
	const each, namespaces = 32, 5
	for i := range 3 * each {
		n.api.put(connector("default", fmt.Sprintf("c-%d", i), "git"))
	}
	volumes := map[string][]*podVolume{}
	for i := range namespaces {
		reader := fmt.Sprintf("team-%d/default", i)
		for j := range 3 {
			var names []string
			for k := range each {
				names = append(names, fmt.Sprintf("default/c-%d", each*j+k))
			}
			v := n.pod(reader).volume("config", attrs{"connector.name": "-", "connectors": strings.Join(names, ",")})
			v.settle()
			volumes[reader] = append(volumes[reader], v)
		}
	}
	polled := func() (number int, reader string) {
		n.api.mu.Lock()
		defer n.api.mu.Unlock()
		count, has := map[string]int{}, map[string]bool{}
		for s := range n.api.streams {
			count[s.reader]++
			has[s.reader+s.path] = true
		}
		for reader, number := range count {
			if number > 64 {
				t.Errorf("%s has %d streams", reader, number)
			}
		}
		for reader := range volumes {
			for i := range 3 * each {
				if !has[reader+connectorPath("default", fmt.Sprintf("c-%d", i))] {
					return i, reader
				}
			}
		}
		t.Error("everything is watched")
		return 0, "team-0/default"
	}
	n.awaitWatches(256)
	number, reader := polled()
	v := volumes[reader][number/each]
	n.api.put(moved(fmt.Sprintf("c-%d", number), "polled"))
	n.age()
	v.mustPublish()
	v.await("all", "https://polled")

	for _, v := range volumes["team-1/default"] {
		v.mustUnpublish()
	}
	delete(volumes, "team-1/default")
	for _, list := range volumes {
		for _, v := range list {
			v.mustPublish()
		}
	}
	n.awaitWatches(256)
	for _, list := range volumes {
		for _, v := range list {
			v.mustUnpublish()
		}
	}
	n.wantForgotten()
}

// A stream that is lost waits as long as the API server asks for, and never longer than five minutes; or else a time
// that grows to half a minute.
func TestStreamsArePostponed(t *testing.T) {
	t.Parallel()
	for range 1000 {
		for _, c := range []struct {
			failures              int
			asked, least, longest time.Duration
		}{
			{0, 0, 0, time.Second},
			{3, 0, 0, 8 * time.Second},
			{5, 0, 0, 30 * time.Second},
			{0, time.Minute, time.Minute, time.Minute},
			{5, 10 * time.Second, 10 * time.Second, 30 * time.Second},
			{5, 5 * time.Minute, 5 * time.Minute, 5 * time.Minute},
			{5, 65535 * time.Second, 5 * time.Minute, 5 * time.Minute}, // the most that a Retry-After is read as
		} {
			if got := reopenTime(c.failures, c.asked); got < c.least || got > c.longest {
				t.Fatalf("after %d failures and a Retry-After of %v it waits %v", c.failures, c.asked, got)
			}
		}
	}
	n := startNode(t)
	// more than is read
	n.api.answer("watch=1", 503, statusBody(503, "ServiceUnavailable", "not now"), "Retry-After", "86400")
	v := n.volume()
	v.mustPublish()
	eventually(t, "both streams are refused", func() bool {
		return len(n.api.watched(gitPath)) > 0 &&
			len(n.api.watched(classPath("git"))) > 0
	})
	n.api.answer("", 0, "")
	n.awaitWatches(2) // by the usual time
}
