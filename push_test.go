package main

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A new resourceVersion, or a status that nobody prints, writes nothing.
func TestNothingIsWrittenIfNoByteChanges(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume()
	wantUnchanged, asked := v.unchangedFromNow(), n.api.countFromNow("")
	n.api.put(connector("default", "git", "git", with("Degraded", "status", "conditions")))
	n.awaitMetric(pushedOK, 1)
	n.api.put(gitClass())
	n.awaitMetric(pushedOK, 2)
	wantUnchanged()
	if got := asked(); got != 2 {
		t.Errorf("%d reads for two changes", got)
	}
}

// An object is read once for all volumes of a ServiceAccount, also for those of one Pod, and its class once for all.
func TestChangeIsReadOnce(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	pod, builder := n.pod(), n.pod("default/builder")
	volumes := []*podVolume{pod.volume("a"), pod.volume("b"), n.volume(), n.volume(), builder.volume("a"),
		builder.volume("b")}
	for _, v := range volumes {
		v.settle()
	}
	n.awaitWatches(3)
	for what, c := range sorted(map[string]struct {
		path   string
		reads  int
		change object
	}{
		"Connector": {gitPath, 2, moved("git", "changed")},
		"class":     {classPath("git"), 1, gitClassOf("new", "{{ .connector.spec.address }}")},
	}) {
		pushed, asked := n.readMetrics()[pushedOK], n.api.countFromNow("")
		n.api.put(c.change)
		n.awaitMetric(pushedOK, pushed+float64(len(volumes)))
		if got := asked(); got != c.reads || n.api.count(c.path) == 0 {
			t.Errorf("%s: %d reads, not %d", what, got, c.reads)
		}
	}
	if got := n.readMetrics()["connectors_csi_push_duration_seconds_count"]; got != 2*float64(len(volumes)) {
		t.Errorf("%v pushes were timed", got)
	}
}

// A volume is pushed at most once a second, however often its objects change: the others wait for nothing.
func TestFloodOfChanges(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(connector("team-a", "git", "git"), connector("team-a", "events", "git"))
	hostile, events, v := n.pod("team-a/default").volume("config"),
		n.pod("team-a/default").volume("config", attrs{"connector.name": "events"}), n.volume()
	for _, v := range []*podVolume{hostile, events, v} {
		v.settle()
	}
	n.awaitWatches(4)
	flood, stop, done := n.api.stream("team-a/default", connectorPath("team-a", "events")), make(chan struct{}),
		make(chan int)
	began, pushed, asked := time.Now(), n.readMetrics()[pushedOK], n.api.countFromNow("")
	go func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				done <- i
				return
			case <-time.After(time.Millisecond):
				n.api.put(connector("team-a", "git", "git", with(fmt.Sprintf("https://%d", i), "spec", "address")))
				flood.send(fmt.Sprintf(`{"type":"MODIFIED","object":{"metadata":{"uid":"x","resourceVersion":"%d"}}}`, 1000+i) +
					"\n")
			}
		}
	}()
	for i := range 3 {
		n.api.put(moved("git", fmt.Sprintf("others-%d", i)))
		changed := time.Now()
		v.await(".gitconfig", fmt.Sprintf("https://others-%d", i))
		t.Logf("another volume's change took %v", time.Since(changed))
	}
	close(stop)
	last := <-done
	hostile.await(".gitconfig", fmt.Sprintf("https://%d\n", last-1))
	limit := 3 * (2 + time.Since(began).Seconds())
	if got := n.readMetrics()[pushedOK] - pushed; got > limit || last < 100 {
		t.Errorf("%v pushes of three volumes in %v, for %d changes", got, time.Since(began), last)
	}
	if got := asked(); float64(got) > limit {
		t.Errorf("%d reads in %v", got, time.Since(began))
	}
}

// A call of kubelet that comes during a push is not told to come again, and has kubelet's new token.
func TestCallDuringAPush(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume()
	asked, gate, result := n.api.countFromNow(gitPath), n.api.hold("/connectors/git"), make(chan error)
	n.api.put(moved("git", "changed"))
	gate.await(1, "a push is under way")
	v.pod.renewToken()
	go func() { result <- v.publish() }()
	eventually(t, "the call reads as well", func() bool { return asked() == 2 })
	gate.open()
	must(t, <-result)
	v.want("token", v.pod.token)
	v.await(".gitconfig", "https://changed")
}

// A change that comes during a call of kubelet is pushed after it, also to a volume that is only then mounted.
func TestPushDuringACall(t *testing.T) {
	t.Parallel()
	for _, mounted := range []bool{true, false} {
		t.Run(fmt.Sprintf("mounted: %v", mounted), func(t *testing.T) {
			n := startNode(t)
			v, w := n.volume(attrs{"token.expiration": "1h"}), n.volume()
			w.settle()
			if mounted {
				v.settle()
				v.endToken()
			}
			n.awaitWatches(2)
			gate, result := n.api.hold("/token"), make(chan error)
			go func() { result <- v.publish() }()
			gate.await(1, "the call asks for a token, and has read the Connector")
			n.api.put(moved("git", "changed"))
			w.await(".gitconfig", "https://changed")
			gate.open()
			must(t, <-result)
			v.await(".gitconfig", "https://changed")
		})
	}
}

// A volume that is unpublished in the middle of its push is gone, at once and for ever.
func TestUnpublishDuringAPush(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume()
	gate := n.api.hold("/connectors/git")
	n.api.put(moved("git", "changed"))
	gate.await(1, "a push is under way")
	log := n.logFromNow()
	v.mustUnpublish()
	gate.open()
	n.wantForgotten()
	v.wantNothing()
	if strings.Contains(log(), "level=ERROR") {
		t.Errorf("the log has an error: %s", log())
	}
}

// A volume that somebody else has unmounted is forgotten with its streams; a push does not mount it again.
func TestUnmountedBySomebodyElse(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume()
	must(t, unix.Unmount(v.target, unix.MNT_DETACH))
	n.api.put(moved("git", "changed"))
	eventually(t, "the driver knows no mount", func() bool { return len(mountsBelow(v.target)) == 0 })
	n.forgetUnmounted()
	n.wantForgotten()
	if len(mountsBelow(v.target)) != 0 {
		t.Error("it is mounted again")
	}
}

// A volume that was never mounted has no streams.
func TestNoStreamForWhatIsNotMounted(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(class("broken", configuration("config", "file", "{{ .none }}")), connector("default", "broken", "broken"))
	n.volume(attrs{"connector.name": "broken"}).mustRefuse(codes.FailedPrecondition)
	n.volume(attrs{"connector.name": "none"}).mustRefuse(codes.NotFound)
	v := n.watchedVolume() // two streams, and no more
	v.mustUnpublish()
	n.wantForgotten()
	n.api.set(func() {
		for _, w := range n.api.watches {
			if w.path != gitPath && w.path != classPath("git") {
				t.Errorf("%s was watched", w.path)
			}
		}
	})
}

// A push uses the token that the driver asked for before.
func TestPushAsksForNoToken(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume(attrs{"token.expiration": "1h"})
	token := v.file("token")
	n.api.put(moved("git", "changed"))
	v.await(".gitconfig", "https://changed")
	v.want("token", token)
	if got := n.api.count(tokenPath("default", "default")); got != 1 {
		t.Errorf("%d TokenRequests", got)
	}
}

// Functions that give something else each time are rendered again when an input changes, and after a restart.
func TestRandomFunctionsAreRenderedOnce(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(gitClassOf("random", "{{ uuidv4 }}", "token", "{{ .context.token }}"))
	v := n.watchedVolume()
	seen := map[string]bool{}
	wantNew := func(what string) {
		t.Helper()
		random := v.file("random")
		if seen[random] {
			t.Errorf("%s: it was not rendered again", what)
		}
		seen[random] = true
		for range 3 {
			v.mustPublish()
		}
		if v.file("random") != random {
			t.Errorf("%s: it was rendered again for nothing", what)
		}
	}
	wantNew("at first")
	v.pod.renewToken()
	v.mustPublish()
	wantNew("a new token")
	n.api.put(connector("default", "git", "git"))
	eventually(t, "a change of the object renders it", func() bool { return !seen[v.file("random")] })
	n.awaitMetric(pushedOK, 1)
	wantNew("a change")
	n.stop()
	n.start()
	v.mustPublish()
	wantNew("a restart")
}

// Every call is validated, and every part of a request that the files are made from counts.
func TestEveryPartOfARequestCounts(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	declared := configuration("config", "token", "{{ .context.token }}", "value", "{{ .configurations.p }}")
	declared["params"] = []any{param("p", "default", "none")}
	n.api.put(class("git", declared, configuration("more", "more", "x")), connector("default", "other", "git"))
	v := n.watchedVolume()
	for _, step := range []struct {
		what   string
		change func()
	}{
		{"configurations", func() { v.attributes["configuration.names"] = "config,more" }},
		{"exclusions", func() { v.attributes["configuration.names"] = "config,more,!value" }},
		{"fewer exclusions", func() { v.attributes["configuration.names"] = "config,more" }},
		{"params", func() { v.attributes["configuration.params"] = `{"config":{"p":"new"}}` }},
		{"token", v.pod.renewToken},
		{"expiration", func() { v.attributes["token.expiration"] = "1h" }},
		{"Connector", func() {
			v.attributes["configuration.names"], v.attributes["connector.name"] = "config", "other"
		}},
		{"group", func() { v.change = group("0") }},
	} {
		before := v.generation()
		step.change()
		v.settle()
		after := v.generation()
		v.mustPublish()
		if v.generation() != after || after == before {
			t.Errorf("%s: generation %d became %d, and then %d", step.what, before, after, v.generation())
		}
	}
	for _, change := range []func(*csi.NodePublishVolumeRequest){
		func(r *csi.NodePublishVolumeRequest) { r.Readonly = false },
		func(r *csi.NodePublishVolumeRequest) { r.VolumeId = "" },
		func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = nil },
		func(r *csi.NodePublishVolumeRequest) { r.VolumeContext["unknown"] = "x" },
		group("x"),
	} {
		v.change = change
		wantError(t, v.publish(), codes.InvalidArgument)
	}
}

// counting is the class "git" with four files of the Connector's number, for readGeneration.
func counting(comment int) object {
	data := []string{}
	for _, name := range fourNames {
		data = append(data, name, fmt.Sprintf(`{{/* %d */}}{{ .connector.spec.number }}{{ "\n" }}{{ repeat 5000 "x" }}`,
			comment))
	}
	return gitClassOf(data...)
}

var fourNames = []string{"a", "b", "c", "d"}

func numberedConnector(name string, number int) object {
	return connector("default", name, "git", with(number, "spec", "number"))
}

// readWhole reads the files of a volume over and over until it is stopped. Each is whole, and those of a generation
// are of one number. A reader that is overtaken by two updates begins again.
func readWhole(dir string, stop chan struct{}) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		before, _ := os.Readlink(dir + "/..data")
		err := cmp.Or(readNames(dir, fourNames), readGeneration(dir, fourNames))
		after, _ := os.Readlink(dir + "/..data")
		if err != nil && (before == after || !errors.Is(err, fs.ErrNotExist)) {
			return err
		}
	}
}

// Objects change faster than they are pushed, while kubelet publishes, republishes and unpublishes the same volumes:
// no call fails, readers see whole generations only, and in the end every volume has the newest content without
// another call. Nothing is left of volumes that are gone.
func TestPushesAmongCalls(t *testing.T) {
	n := startNode(t)
	n.api.put(counting(0), numberedConnector("git-0", 0), numberedConnector("git-1", 0))
	var volumes []*podVolume
	for i := range 8 {
		pod := n.pod([]string{"default/default", "default/builder"}[i/2%2])
		volumes = append(volumes, pod.volume("config", attrs{"connector.name": fmt.Sprintf("git-%d", i%2)}))
		volumes[i].settle()
	}
	n.awaitWatches(5)
	descriptorsBefore := descriptors(t)
	stop, results, changes := make(chan struct{}), make(chan error), make(chan int)
	go func() {
		for i := 1; ; i++ {
			select {
			case <-stop:
				changes <- i
				return
			case <-time.After(time.Millisecond):
				n.api.put(numberedConnector(fmt.Sprintf("git-%d", i%2), i))
				if i%50 == 0 {
					n.api.put(counting(i))
				}
			}
		}
	}()
	for _, v := range volumes[:4] {
		go func(dir string) { results <- readWhole(dir, stop) }(startContainer(t, v))
	}
	calls := make(chan error)
	for i, v := range volumes {
		go func() {
			var err error
			for round := 0; round < times(10, 100) && err == nil; round++ {
				if round%5 == 2 {
					v.pod.renewToken()
				}
				if i >= 4 && round%5 == 0 { // this one comes and goes
					err = v.unpublish()
				}
				err = cmp.Or(err, v.publish())
			}
			calls <- err
		}()
	}
	for range volumes {
		if err := <-calls; err != nil {
			t.Error(err)
		}
	}
	close(stop)
	for range 4 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	last := <-changes
	n.api.put(numberedConnector("git-0", last), numberedConnector("git-1", last))
	for _, v := range volumes {
		v.await("a", fmt.Sprintf("%d\n", last))
		v.mustPublish()
		v.wantClean()
	}
	t.Logf("%d changes, %v pushes", last, n.readMetrics()[pushedOK])
	for _, v := range volumes {
		v.mustUnpublish()
	}
	n.wantForgotten()
	n.endRenderers()
	eventually(t, fmt.Sprintf("there are %d descriptors as before", descriptorsBefore),
		func() bool { return descriptors(t) <= descriptorsBefore })
}

// Killed in the middle of pushes, and started again, the driver leaves whole files, and goes on with kubelet's call.
func TestKilledDuringPushes(t *testing.T) {
	n := newNode(t)
	number := 0
	change := func() {
		number++
		n.api.put(numberedConnector("git", number))
	}
	n.api.put(counting(0))
	change()
	volumes := []*podVolume{n.volume(), n.volume()}
	stop, results, readers := make(chan struct{}), make(chan error, 2), 0
	for round := range times(3, 8) {
		p := n.startBinary(rendererBinary(), anHour)
		for _, v := range volumes {
			v.settle()
			if readers < len(volumes) {
				readers++
				go func(dir string) { results <- readWhole(dir, stop) }(startContainer(t, v))
			}
		}
		n.awaitWatches(2)
		change()
		for range round * times(6, 5) / 2 { // another moment each time
			time.Sleep(100 * time.Microsecond)
			change()
		}
		p.kill()
		n.api.awaitStreams(0)
		change()
	}
	n.startBinary(rendererBinary(), anHour)
	for _, v := range volumes {
		v.mustPublish()
		v.await("a", fmt.Sprintf("%d\n", number))
	}
	n.awaitWatches(2)
	change()
	for _, v := range volumes {
		v.await("a", fmt.Sprintf("%d\n", number))
		v.mustPublish()
		v.wantClean()
	}
	close(stop)
	for range volumes {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

// After a restart the first call writes nothing if nothing has changed, and from it on changes are pushed again.
func TestRestartOfAWatchingDriver(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	p := n.startBinary(rendererBinary(), anHour)
	v := n.watchedVolume()
	wantUnchanged := v.unchangedFromNow()
	must(t, p.Process.Signal(syscall.SIGTERM)) // which no stream delays
	p.awaitExit(t)
	if code := p.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	n.api.awaitStreams(0)
	n.startBinary(rendererBinary(), anHour)
	v.settle()
	wantUnchanged()
	n.awaitWatches(2)
	n.api.put(moved("git", "changed"))
	v.await(".gitconfig", "https://changed")
	if !strings.Contains(p.log.String(), "stopped") {
		t.Errorf("the log is %s", p.log)
	}
}

// ---- A second after an update ----

// watchFile watches what a path leads to by inotify, as a program does that wants to know of a change of its file. What
// it returns reads the events that have come.
func watchFile(t *testing.T, path string) (events func() uint32) {
	t.Helper()
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	must(t, err)
	t.Cleanup(func() { unix.Close(watch) })
	_, err = unix.InotifyAddWatch(watch, path, unix.IN_ALL_EVENTS&^(unix.IN_OPEN|unix.IN_ACCESS|unix.IN_CLOSE_NOWRITE))
	must(t, err)
	seen, buffer := uint32(0), make([]byte, 4096)
	return func() uint32 {
		n, err := unix.Read(watch, buffer)
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			t.Fatal(err)
		}
		for i := 0; i+unix.SizeofInotifyEvent <= n; {
			seen |= binary.NativeEndian.Uint32(buffer[i+4:])
			i += unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(buffer[i+12:]))
		}
		return seen
	}
}

// generations is how many generations a volume has.
func (v *podVolume) generations() int {
	v.t.Helper()
	found, err := filepath.Glob(v.target + "/..gen-*")
	must(v.t, err)
	return len(found)
}

// A program that watches one file, through its container's mount, hears of each change soon, without a call of kubelet:
// of one that is pushed, and of one that a call brings.
func TestWatchedFileIsRemoved(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume()
	dir := startContainer(t, v)
	for what, change := range sorted(map[string]func(){
		"pushed": func() {
			n.api.put(moved("git", "changed"))
			v.await(".gitconfig", "https://changed")
		},
		"called": func() {
			v.pod.renewToken()
			v.mustPublish()
		},
	}) {
		events := watchFile(t, dir+"/.gitconfig")
		change()
		eventually(t, what+": the file is removed", func() bool { return events()&unix.IN_DELETE_SELF != 0 })
		eventually(t, what+": its directory is, too", func() bool { return v.generations() == 1 })
		v.wantClean()
	}
}

// Within the second after an update kubelet's calls go on as ever, and are never told to come again, also while old
// files are being removed.
func TestCallsWithinTheSecond(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume()
	r := v.record()
	stop := make(chan bool)
	done := make(chan bool)
	go func() { // removes old files all the time, as the timer does once
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				n.sweep(r)
			}
		}
	}()
	for range 200 {
		v.pod.renewToken()
		must(t, v.publish())
		v.want("token", v.pod.token)
	}
	v.mustUnpublish()
	close(stop)
	<-done
	n.wantForgotten()
	v.wantNothing()
}

// A volume that is unmounted within the second, by unpublish or by somebody else, is no matter for the log.
func TestUnmountedWithinTheSecond(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	for what, unmount := range sorted(map[string]func(*podVolume){
		"unpublish":     func(v *podVolume) { v.mustUnpublish() },
		"somebody else": func(v *podVolume) { must(t, unix.Unmount(v.target, unix.MNT_DETACH)) },
		"and covered":   func(v *podVolume) { must(t, unix.Mount("other", v.target, "tmpfs", 0, "")) },
	}) {
		v := n.volume()
		v.mustPublish()
		v.pod.renewToken()
		v.mustPublish()
		r := v.record()
		if v.generations() != 2 || r.sweepTimer == nil {
			t.Errorf("%s: there are %d generations, and a timer: %v", what, v.generations(), r.sweepTimer != nil)
		}
		unmount(v)
		log := n.logFromNow()
		n.sweep(r)
		if said := log(); said != "" {
			t.Errorf("%s: the log has %s", what, said)
		}
	}
}

// A driver that is killed within the second leaves old files, which the next one's first call removes, whether it
// changes something or not.
func TestKilledWithinTheSecond(t *testing.T) {
	t.Parallel()
	for _, change := range []bool{false, true} {
		t.Run(fmt.Sprintf("a change: %v", change), func(t *testing.T) {
			n := newNode(t)
			p := n.startProcess()
			v := n.volume()
			for ok := false; !ok; ok = v.generations() == 2 { // unless this machine takes a second for it
				v.pod.renewToken()
				v.mustPublish()
				v.pod.renewToken()
				v.mustPublish()
				p.kill()
				if v.generations() == 1 {
					p = n.startProcess()
				}
			}
			n.startProcess()
			events := watchFile(t, v.target+"/token")
			if change {
				v.pod.renewToken()
			}
			v.mustPublish()
			v.want("token", v.pod.token)
			if !change && (v.generations() != 1 || events() != 0) {
				t.Errorf("%d generations, and %#x for the files", v.generations(), events())
			}
			eventually(t, "there is one generation", func() bool { return v.generations() == 1 })
			v.wantClean()
		})
	}
}

// ---- Records of volumes that somebody else unmounts ----

// A volume that somebody else has unmounted, and that kubelet's next call cannot mount, is forgotten with all that was
// kept of it.
func TestUnmountedAndRefused(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume(attrs{"token.expiration": "1h"})
	must(t, unix.Unmount(v.target, unix.MNT_DETACH))
	n.api.remove(gitPath)
	wantError(t, v.publish(), codes.NotFound)
	n.wantForgotten()
	if kept := n.kept(""); kept != 0 || n.used() != 0 {
		t.Errorf("%d bytes are kept, and %d of memory counted", kept, n.used())
	}
}

// A push that is due when its volume is forgotten, while a call waits, does not keep later ones from coming.
func TestForgottenWhileAPushIsDue(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	d, v := n.driver, n.watchedVolume()
	r := v.record()
	must(t, unix.Unmount(v.target, unix.MNT_DETACH))
	result, begun, goOn := make(chan error), make(chan bool), make(chan bool)
	go d.inTurn(r, func(context.Context) {
		begun <- true
		<-goOn
		d.forget(r)
	})
	<-begun
	go func() { result <- v.publish() }()
	n.awaitCalls(1)
	n.locked(func() { r.pushed, r.failures = time.Now(), 5 }) // the next is half a minute from now
	d.pushSoon(r)
	goOn <- true
	must(t, <-result)
	n.locked(func() { r.failures = 0 })
	n.awaitWatches(2)
	n.api.put(moved("git", "changed"))
	v.await(".gitconfig", "https://changed")
	if sum := n.readMetrics()["connectors_csi_push_duration_seconds_sum"]; sum > 60 {
		t.Errorf("pushes took %v s", sum)
	}
}

// Records come and go while everybody is at them: calls that give up, pushes, removals of old files, volumes that
// somebody unmounts, whoever looks for those, and the end of the driver. No call is left waiting, and nothing is left.
func TestRecordsAmongEverything(t *testing.T) {
	n := startNode(t)
	d, stop := n.driver, make(chan bool)
	var volumes []*podVolume
	for range 4 {
		volumes = append(volumes, n.volume(attrs{"token.expiration": "1h"}))
		volumes[len(volumes)-1].settle()
	}
	n.awaitWatches(2)
	var all sync.WaitGroup
	forever := func(do func(i int)) {
		all.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
					do(i)
				}
			}
		})
	}
	records := func() (found []*volume) {
		n.eachVolume(func(v *volume) { found = append(found, v) })
		return found
	}
	forever(func(i int) { n.api.put(moved("git", fmt.Sprint(i))) })
	forever(func(int) { d.forgetUnmounted() })
	forever(func(i int) {
		for _, v := range records() {
			d.push(v, i%2 == 0)
			d.inTurn(v, func(context.Context) { d.sweep(v) })
			d.pushSoon(v)
		}
	})
	forever(func(i int) {
		unix.Unmount(volumes[i%2].target, unix.MNT_DETACH)
		time.Sleep(time.Millisecond)
	})
	var calls sync.WaitGroup
	for i, v := range volumes {
		calls.Go(func() {
			for round := range times(10, 40) {
				var err error
				switch {
				case round%10 == 9:
					err = v.unpublish()
				case round%3 == 0: // it gives up
					err = v.publishWithin(time.Duration(round) * 50 * time.Microsecond)
					if code := status.Code(err); code == codes.DeadlineExceeded || code == codes.Canceled {
						err = nil
					}
				default:
					err = v.publish()
				}
				// The one that gave up may still be under way.
				if err != nil && status.Code(err) != codes.Aborted && i >= 2 {
					t.Error(err)
				}
			}
		})
	}
	calls.Wait()
	if t.Failed() {
		close(stop)
		all.Wait()
		return
	}
	n.awaitCalls(0)
	n.stop() // beside all of it
	close(stop)
	all.Wait()
	for _, v := range records() {
		t.Errorf("%s is left: %+v", v.target, v)
	}
	if len(d.kept) > 1 || d.kept[""] != 0 {
		t.Errorf("%v is kept", d.kept)
	}
}
