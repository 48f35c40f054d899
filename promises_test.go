package main

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// What docs/security.md promises and no test of a subject of its own tries.

// The kernel swaps nothing of a volume out, where it can be told not to: from Linux 6.4 on, outside of user namespaces.
func TestVolumesAreNotSwapped(t *testing.T) {
	t.Parallel()
	conf, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	must(t, err)
	defer unix.Close(conf)
	if err := unix.FsconfigSetFlag(conf, "noswap"); err != nil {
		t.Skipf("this kernel, or this user namespace, has no noswap: %v", err)
	}
	v := startNode(t).volume()
	v.mustPublish()
	if m := mountsBelow(v.target)[0]; !slices.Contains(strings.Split(m.super, ","), "noswap") {
		t.Errorf("no noswap in %+v", m)
	}
}

// Nothing in the metrics names an object, a place or a content, whatever happens.
func TestMetricsNameNobody(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(class("class-name", configuration("config", "file-name", "the content {{ .context.token }}")),
		connector("tenant-name", "connector-name", "class-name"))
	attributes := attrs{"connector.name": "connector-name"}
	v := n.pod("tenant-name/account-name").volume("config", attributes)
	v.mustPublish()
	n.api.put(connector("tenant-name", "connector-name", "class-name", with("https://address-name", "spec", "address")))
	n.awaitMetric(`connectors_csi_pushes_total{code="OK"}`, 1)
	n.api.put(class("class-name", configuration("config", "file-name",
		"{{ .connector.spec.missing }}{{/* the content */}}")))
	n.pod("tenant-name/account-name").volume("config", attributes).mustRefuse(codes.FailedPrecondition)
	n.pod("tenant-name/account-name").volume("config", attrs{"connector.name": "none-name"}).mustRefuse(codes.NotFound)
	n.api.forbid("tenant-name/account-name", connectorPath("tenant-name", "connector-name"))
	n.pod("tenant-name/account-name").volume("config", attributes).mustRefuse(codes.PermissionDenied)
	for _, path := range []string{"/metrics", "/healthz", "/readyz", "/tenant-name"} {
		_, body := n.get(path)
		for _, word := range []string{"-name", v.pod.name, v.pod.uid, "content", n.dir, "/pods", "http:", "https:", "eyJ",
			v.pod.token} {
			if strings.Contains(body, word) {
				t.Errorf("%s has %q: %s", path, word, body)
			}
		}
	}
}

// Of the answers above 64 KiB two are read at once, whoever waits for them; smaller ones are not kept waiting.
func TestLargeAnswersAtOnceAreBounded(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	rest := make(chan bool)
	n.api.set(func() {
		n.api.intercept = func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/connectors/large") || r.URL.Query().Has("watch") {
				return false
			}
			w.Write([]byte("{" + strings.Repeat(" ", smallAnswerBytes+1)))
			http.NewResponseController(w).Flush()
			select {
			case <-rest:
			case <-r.Context().Done():
			}
			w.Write([]byte(`"metadata":{"name":"large","namespace":"default","uid":"u","resourceVersion":"1"},` +
				`"spec":{"connectorClassName":"git"}}`))
			return true
		}
	})
	const readers = 8
	results := make(chan error)
	for i := range readers {
		v := n.pod(fmt.Sprintf("team-%d/default", i)).volume("config",
			attrs{"connector.name": "large", "connector.namespace": "default", "configuration.names": "first"})
		go func() { results <- v.publish() }()
	}
	q := n.driver.kube.largeAnswers
	eventually(t, "all answers have begun", func() bool {
		q.mu.Lock()
		defer q.mu.Unlock()
		if len(q.active) > 2 {
			t.Fatalf("%d large answers are read at once", len(q.active))
		}
		return len(q.active)+len(q.waiting) == readers
	})
	n.volume().mustPublish()
	close(rest)
	for range readers {
		must(t, <-results)
	}
}

// A watch lasts for half an hour at most. One that a ServiceAccount may not open again is no reason to go on with what
// it was given: the next call that finds the object older than the refresh interval reads it, and is refused.
func TestPermissionTakenAwayWhileNothingChanges(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	v.settle()
	n.awaitWatches(2)
	for _, path := range []string{gitPath, classPath("git")} {
		for _, w := range n.api.watched(path) {
			if lasts := time.Duration(w.seconds) * time.Second; lasts < 25*time.Minute || lasts > 30*time.Minute {
				t.Errorf("a watch of %s may last %v", path, lasts)
			}
		}
	}
	n.api.forbid("default/default", gitPath)
	v.mustPublish() // its watch is open and has said nothing
	stream := n.api.stream("default/default", gitPath)
	n.api.forbid("default/default", "watch "+gitPath)
	stream.close(false)
	n.awaitWatches(1)
	n.age()
	wantError(t, v.publish(), codes.PermissionDenied, "may not read")
	v.want("token", v.pod.token)
}

// A request of which the API server answers nothing, or a byte now and then, ends after its fifteen seconds, long
// before the call itself would; nothing is left of it.
func TestRequestsEnd(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(connector("default", "trickle", "git"))
	n.api.set(func() {
		n.api.intercept = func(w http.ResponseWriter, r *http.Request) bool {
			for tick := time.NewTicker(100 * time.Millisecond); r.Context().Err() == nil; <-tick.C {
				if strings.HasSuffix(r.URL.Path, "/connectors/trickle") {
					w.Write([]byte(" "))
					http.NewResponseController(w).Flush()
				}
			}
			return true
		}
	})
	began, results := time.Now(), make(chan error)
	silent, trickle := n.volume(), n.volume(attrs{"connector.name": "trickle"})
	for _, v := range []*podVolume{silent, trickle} {
		go func() { results <- v.publish() }()
	}
	for range 2 {
		if err := <-results; err == nil || !strings.Contains(err.Error(), "cannot be read: no answer from the API server") {
			t.Errorf("the error is %v", err)
		}
	}
	if took := time.Since(began); took < requestTimeout || took > publishTimeout-10*time.Second {
		t.Errorf("it took %v", took)
	}
	silent.wantNothing()
	trickle.wantNothing()
	n.api.set(func() { n.api.intercept = nil })
	silent.mustPublish()
}
