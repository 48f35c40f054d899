package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// ---- The mount ----

func TestMountIsReadOnly(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	v.mustPublish()
	m := mountsBelow(v.target)[0]
	if m.fstype != "tmpfs" || m.source != "connectors-csi" {
		t.Errorf("mounted is %+v", m)
	}
	for _, option := range []string{"ro", "nosuid", "nodev", "noexec"} {
		if !slices.Contains(strings.Split(m.options, ","), option) {
			t.Errorf("no %s in %s", option, m.options)
		}
	}
	t.Logf("the tmpfs has the options %s", m.super)
	for what, try := range sorted(map[string]func() error{
		"create":   func() error { return os.WriteFile(v.target+"/new", nil, 0o644) },
		"truncate": func() error { return os.Truncate(v.target+"/token", 0) },
		"remove":   func() error { return os.Remove(v.target + "/token") },
		"rename":   func() error { return os.Rename(v.target+"/token", v.target+"/other") },
		"chmod":    func() error { return os.Chmod(v.target+"/token", 0o777) },
	}) {
		if err := try(); !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v", what, err)
		}
	}
	v.wantClean()
}

func TestModes(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	gid := 0 // the only group there is in a user namespace of an ordinary user
	if text, err := os.ReadFile("/proc/self/gid_map"); err != nil || strings.Fields(string(text))[2] != "1" {
		gid = 2000
	}
	owner := func(path string) (fs.FileMode, int) {
		info, err := os.Stat(path)
		must(t, err)
		return info.Mode(), int(info.Sys().(*syscall.Stat_t).Gid)
	}
	v := n.volume()
	for _, step := range []struct {
		group     string
		dir, file fs.FileMode
		gid       int
	}{{"", 0o555, 0o444, 0}, {strconv.Itoa(gid), 0o550, 0o440, gid}} {
		v.change = group(step.group)
		v.settle()
		for _, path := range []string{"/..data", "/token", "/.gitconfig"} {
			want := step.file
			if path == "/..data" {
				want = fs.ModeDir | step.dir
			}
			if mode, gid := owner(v.target + path); mode != want || gid != step.gid {
				t.Errorf("group %q: %s has mode %v and group %d, not %v and %d", step.group, path, mode, gid, want, step.gid)
			}
		}
		other := n.volume()
		other.change = v.change
		other.mustPublish()
		if mode, gid := owner(other.target); mode != fs.ModeDir|step.dir || gid != step.gid {
			t.Errorf("group %q: the volume has mode %v and group %d", step.group, mode, gid)
		}
	}
}

func TestPublishTwiceIsOneMount(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	v.mustPublish()
	wantUnchanged := v.unchangedFromNow()
	for range 4 {
		v.mustPublish()
	}
	wantUnchanged()
}

func TestOverlappingPublishes(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	gate := n.api.hold("/connectors/")
	results := make(chan error)
	for range 8 {
		go func() { results <- v.publish() }()
	}
	for range 7 { // all but the one that holds the target
		wantError(t, <-results, codes.Aborted, "another call", "kubelet will try again")
	}
	gate.await(1, "it asks the API server")
	wantError(t, v.unpublish(), codes.Aborted, "another call")
	gate.open()
	must(t, <-results)
	v.mustPublish()
	v.wantClean()
	v.mustUnpublish()
}

func TestPublishesOfDifferentTargetsRunInParallel(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	gate := n.api.hold("/connectors/")
	pod := n.pod()
	volumes := []*podVolume{pod.volume("a"), pod.volume("b"), n.volume()}
	results := publishAtOnce(volumes)
	gate.await(len(volumes), "all have come to the API server")
	gate.open()
	for range volumes {
		must(t, <-results)
	}
}

// At most 16 requests of Pods are under way, four of them for one namespace, and the driver's own have places beside
// them.
func TestRequestsAtOnceAreBounded(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	gate := n.api.hold("/connectors/")
	results := make(chan error)
	count := 0
	publish := func(serviceAccount string, volumes int) {
		t.Helper()
		for range volumes {
			go func(v *podVolume) { results <- v.publish() }(n.pod(serviceAccount).volume("config",
				attrs{"connector.namespace": "default"}))
		}
		count += volumes
		n.awaitCalls(count)
	}
	wantRequests := func(want int) {
		t.Helper()
		gate.await(want, "requests are under way")
		if got := n.api.count(""); got != want {
			t.Errorf("%d requests have come", got)
		}
	}
	publish("team-a/default", 40)
	wantRequests(4)
	publish("team-b/default", 5) // does not wait for team-a
	wantRequests(8)
	publish("team-c/default", 5)
	publish("team-d/default", 5)
	publish("team-e/default", 5)
	wantRequests(16)
	other := n.driver.kube.begin(&lookup{pod: podIdentity{namespace: "team-f"}, first: true})
	if _, err := other.class(t.Context(), "git"); err != nil {
		t.Errorf("the driver's own request waits for those of Pods: %v", err)
	}
	other.end()
	gate.open()
	for range count {
		must(t, <-results)
	}
	if k := n.driver.kube; len(k.charged) != 0 || len(k.requests.active) != 0 {
		t.Errorf("nobody is at it, and yet: %v, %d", k.charged, len(k.requests.active))
	}
}

func TestConnectionIsReused(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.volume().settle()
	n.awaitWatches(2)
	connections := n.api.connections.Load()
	for range 10 {
		n.volume().mustPublish()
	}
	n.api.set(func() {
		if n.api.connections.Load() != connections || connections > 3 || !n.api.protocols["HTTP/2.0"] ||
			len(n.api.protocols) != 1 {
			t.Errorf("%d connections, protocols %v", n.api.connections.Load(), n.api.protocols)
		}
	})
}

func TestUnpublish(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	mount := func(v *podVolume, fstype string) {
		t.Helper()
		must(t, unix.Mount(fstype, v.target, fstype, 0, ""))
	}

	v := n.volume()
	v.mustUnpublish() // of nothing
	v.mustPublish()
	v.mustUnpublish()
	v.mustUnpublish() // twice

	must(t, os.Mkdir(v.target, 0o750)) // left by a killed process, or after a reboot
	v.mustUnpublish()

	v.mustPublish()
	mount(v, "tmpfs") // somebody stacked two mounts on it
	mount(v, "tmpfs")
	v.mustUnpublish()

	v.mustPublish()
	inside, err := os.Open(v.target) // somebody stands in it
	must(t, err)
	defer inside.Close()
	v.mustUnpublish()

	must(t, os.Mkdir(v.target, 0o750)) // not the driver's
	must(t, os.WriteFile(v.target+"/precious", nil, 0o644))
	wantError(t, v.unpublish(), codes.FailedPrecondition, "holds something that connectors-csi did not mount")
	if _, err := os.Stat(v.target + "/precious"); err != nil {
		t.Error(err)
	}

	gone := n.volume()
	must(t, os.RemoveAll(n.podsDir()+"/"+gone.pod.uid)) // kubelet has cleaned up already
	gone.mustUnpublish()
	if n.api.count(classPath("git")) != 3 {
		t.Error("unpublishing has asked the API server")
	}
}

func TestLeftoverDirectoryIsUsed(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	must(t, os.Mkdir(v.target, 0o750)) // of a process that was killed between mkdir and mount
	v.mustPublish()
	v.wantClean()
	v.mustUnpublish()
}

func TestForeignMountIsLeftAlone(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"ramfs", "tmpfs"} {
		t.Run(kind, func(t *testing.T) {
			n := startNode(t)
			v := n.volume()
			must(t, os.Mkdir(v.target, 0o755))
			must(t, unix.Mount("foreign", v.target, kind, 0, ""))
			must(t, os.WriteFile(v.target+"/precious", nil, 0o644))
			wantError(t, v.publish(), codes.FailedPrecondition, "did not mount", v.target, "look at it on the node")
			entries, err := os.ReadDir(v.target)
			if err != nil || len(entries) != 1 || entries[0].Name() != "precious" || len(mountsBelow(v.target)) != 1 {
				t.Error("it was touched:", err, entries, mountsBelow(v.target))
			}
		})
	}
}

func TestFileAtTargetIsLeftAlone(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	other := n.volume()
	other.mustPublish()
	for what, put := range sorted(map[string]func(target string) error{
		"a file": func(target string) error { return os.WriteFile(target, []byte("precious"), 0o644) },
		"a link": func(target string) error { return os.Symlink(other.target, target) },
	}) {
		t.Run(what, func(t *testing.T) {
			v := n.volume()
			must(t, put(v.target))
			wantError(t, v.publish(), codes.FailedPrecondition, "did not mount")
			wantError(t, v.unpublish(), codes.FailedPrecondition, "did not mount")
			if _, err := os.Lstat(v.target); err != nil {
				t.Error("it was touched:", err)
			}
		})
	}
	other.want("token", other.pod.token)
}

func TestMissingParentIsNotCreated(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	must(t, os.RemoveAll(n.podsDir()+"/"+v.pod.uid))
	v.mustRefuse(codes.Internal, "no such file or directory")
}

// A container sees the volume by a mount of its own, which it keeps for its lifetime.
func TestChangesReachRunningContainers(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	n.api.put(gitClassOf("address", "{{ .connector.spec.address }}", "old", "x"))
	v := n.volume()
	v.mustPublish()
	container := startContainer(t, v)
	directory, err := os.Open(container)
	must(t, err)
	defer directory.Close()

	n.api.put(connector("default", "git", "git", with("https://changed", "spec", "address")))
	n.api.put(gitClassOf("address", "{{ .connector.spec.address }}", "new", "y"))
	v.mustPublish()
	v.want("address", "https://git.example.com") // within the refresh interval
	n.age()
	v.mustPublish()
	v.wantClean()
	v.wantFiles("address", "new")
	for _, path := range []string{container, fmt.Sprintf("/proc/self/fd/%d", directory.Fd())} {
		if text, err := os.ReadFile(path + "/address"); string(text) != "https://changed" {
			t.Errorf("%s: %q, %v", path, text, err)
		}
		if _, err := os.Lstat(path + "/old"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s/old: %v", path, err)
		}
		if text, err := os.ReadFile(path + "/new"); string(text) != "y" {
			t.Errorf("%s/new: %q, %v", path, text, err)
		}
		if err := os.WriteFile(path+"/x", nil, 0o644); !errors.Is(err, unix.EROFS) {
			t.Errorf("the container may write: %v", err)
		}
	}
	eventually(t, "the old files are gone, by themselves", func() bool {
		generations, _ := filepath.Glob(container + "/..gen-*")
		return len(generations) == 1
	})
}

// startContainer mounts the volume as a container runtime does: recursively, private, read-only.
func startContainer(t testing.TB, v *podVolume) string {
	dir := fmt.Sprintf("%s/%d", containerDir, serial.Add(1))
	must(t, os.Mkdir(dir, 0o755))
	must(t, unix.Mount(v.target, dir, "", unix.MS_BIND|unix.MS_REC, ""))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	must(t, unix.Mount("", dir, "", unix.MS_PRIVATE|unix.MS_REC, ""))
	must(t, unix.Mount("", dir, "",
		unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""))
	return dir
}

func TestFailedRepublishKeepsTheFiles(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	v := n.volume()
	v.mustPublish()
	wantUnchanged := v.unchangedFromNow()
	for what, fail := range sorted(map[string]func(){
		"API server":    func() { n.api.answer("/connectors/", 500, "") },
		"Connector":     func() { n.api.remove(connectorPath("default", "git")) },
		"template":      func() { n.api.put(gitClassOf("token", "{{ .connector.spec.none }}")) },
		"configuration": func() { n.api.put(class("git", configuration("other"))) },
		"too large":     func() { n.api.put(gitClassOf("token", `{{ repeat 1048577 "x" }}`)) },
	}) {
		n.api.answer("", 0, "")
		n.api.put(gitClass(), connector("default", "git", "git"))
		fail()
		n.age()
		if err := v.publish(); err == nil {
			t.Errorf("%s: it was published", what)
		}
		wantUnchanged()
		v.wantClean()
	}
	n.api.answer("", 0, "")
	n.api.put(gitClass(), connector("default", "git", "git", with("https://repaired", "spec", "address")))
	n.age()
	v.mustPublish()
	if !strings.Contains(v.file(".gitconfig"), "https://repaired") {
		t.Error("it was not repaired")
	}
}

func TestInterruptedUpdatesAreCompleted(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	next := files{"token": []byte("next"), "mark": []byte("next"), "more": []byte("next")}
	half := generationPrefix + digest(next, permissions{mode: defaultMode})
	for what, interrupt := range sorted(map[string]func(dir string) error{
		"link not renamed":       func(dir string) error { return os.Symlink("..gen-x", dir+"/..data_tmp") },
		"directory of that name": func(dir string) error { return os.MkdirAll(dir+"/..data_tmp/x", 0o755) },
		"old generation":         func(dir string) error { return os.CopyFS(dir+"/..gen-0123", os.DirFS(dir+"/..data/")) },
		"half-written generation": func(dir string) error {
			return errors.Join(os.Mkdir(dir+"/"+half, 0o700), os.WriteFile(dir+"/"+half+"/token", []byte("ne"), 0o400))
		},
		"generation with more in it": func(dir string) error {
			return errors.Join(os.Mkdir(dir+"/"+half, 0o700), os.WriteFile(dir+"/"+half+"/stray", []byte("x"), 0o400))
		},
		"link without its file":   func(dir string) error { return os.Symlink("..data/more", dir+"/more") },
		"old link":                func(dir string) error { return os.Symlink("..data/gone", dir+"/gone") },
		"file without its link":   func(dir string) error { return os.Remove(dir + "/token") },
		"no current generation":   func(dir string) error { return os.Remove(dir + "/..data") },
		"generation that is gone": func(dir string) error { return os.RemoveAll(dir + "/..data/") },
		"current link leads astray": func(dir string) error {
			return errors.Join(os.Remove(dir+"/..data"), os.Symlink("..gen-none", dir+"/..data"))
		},
	}) {
		t.Run(what, func(t *testing.T) {
			n.api.put(gitClass())
			n.age()
			v := n.volume()
			v.t = t
			v.settle()
			must(t, interrupt(v.writable()))
			n.api.put(gitClassOf("token", "next", "mark", "next", "more", "next"))
			n.age()
			v.mustPublish()
			v.wantClean()
			v.wantFiles("mark", "more", "token")
			v.want("token", "next")
		})
	}
}

func TestMountWithoutFilesIsCompleted(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	v.settle()
	dir := v.writable()
	must(t, os.Remove(dir+"/..data"))
	v.mustPublish() // nothing else has changed
	v.wantClean()
	v.want("token", v.pod.token)
}

func TestFullVolume(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	v.mustPublish()
	wantUnchanged := v.unchangedFromNow()
	filler := v.writable() + "/..filler" // as one of the driver's own; another name would make the mount somebody else's
	file, err := os.Create(filler)
	must(t, err)
	if _, err := io.Copy(file, zeros{}); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the volume is not limited: %v", err)
	}
	must(t, file.Close())

	_, _, err = updateVolume(v.target, map[string][]byte{"token": []byte("new")}, permissions{mode: defaultMode})
	wantError(t, answer(mountError(err)), codes.ResourceExhausted, "no room", "no space left on device")
	wantUnchanged()
	if generations, _ := filepath.Glob(v.target + "/..gen-*"); len(generations) != 1 {
		t.Errorf("generations %v", generations)
	}
	v.pod.renewToken()
	wantError(t, v.publish(), codes.ResourceExhausted, "KiB of memory") // and not even tried

	must(t, os.Truncate(filler, 0))
	v.mustPublish()
	v.wantClean()
	v.want("token", v.pod.token)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// During updates, 1,000 in long tests, readers never see a file missing, a part of the files, or files of two
// generations, and nobody can write. The files of a generation stay until the next but one comes, so a reader that is
// kept from running for two updates, which take milliseconds here and a minute or more in a cluster, has to begin
// again.
func TestReadersDuringUpdates(t *testing.T) {
	n := startPolling(t)
	names := []string{"a", "b", "c", "d"}
	v := n.volume()
	publish := func(i int) {
		data := []string{}
		for _, name := range names {
			data = append(data, name, fmt.Sprintf("%d\n%s", i, strings.Repeat("x", 5000)))
		}
		n.api.put(gitClassOf(data...))
		n.age()
		v.mustPublish()
	}
	publish(0)
	container := startContainer(t, v)
	stop, result, reads := make(chan struct{}), make(chan error, 1), 0
	var begun, done atomic.Int64 // updates
	go func() {
		for {
			select {
			case <-stop:
				result <- nil
				return
			default:
			}
			current := done.Load()
			err := cmp.Or(readNames(container, names), readGeneration(container, names))
			if errors.Is(err, fs.ErrNotExist) && begun.Load() >= current+2 {
				continue
			}
			if writeErr := os.WriteFile(container+"/x", nil, 0o644); !errors.Is(writeErr, unix.EROFS) {
				err = fmt.Errorf("the container may write: %v", writeErr)
			}
			if err != nil {
				result <- err
				return
			}
			reads++
		}
	}()
	for i := 1; i <= times(100, 1000) && len(result) == 0; i++ {
		begun.Add(1)
		publish(i)
		done.Add(1)
	}
	close(stop)
	if err := <-result; err != nil {
		t.Error(err)
	}
	v.wantClean()
	if reads < times(10, 100) {
		t.Errorf("only %d reads", reads)
	}
}

// readNames reads every file by its visible name: each is there and complete.
func readNames(dir string, names []string) error {
	for _, name := range names {
		text, err := os.ReadFile(dir + "/" + name)
		if err != nil {
			return fmt.Errorf("missing: %w", err)
		}
		if _, err := generationOf(string(text)); err != nil {
			return err
		}
	}
	return nil
}

// readGeneration reads all files of one generation, which is removed when the next but one comes.
func readGeneration(dir string, names []string) error {
	root, err := os.OpenRoot(dir + "/..data")
	if err != nil {
		return fmt.Errorf("missing: %w", err)
	}
	defer root.Close()
	seen := -1
	for _, name := range names {
		text, err := root.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			if entries, err := fs.ReadDir(root.FS(), "."); err == nil && len(entries) == len(names) {
				return fmt.Errorf("%s is missing among %v", name, entries)
			}
			return nil // this generation is being removed
		}
		if err != nil {
			return err
		}
		number, err := generationOf(string(text))
		if err != nil {
			return err
		}
		if seen >= 0 && number != seen {
			return fmt.Errorf("generation %d has a file of %d", seen, number)
		}
		seen = number
	}
	return nil
}

func generationOf(text string) (int, error) {
	first, rest, _ := strings.Cut(text, "\n")
	number, err := strconv.Atoi(first)
	if err != nil || rest != strings.Repeat("x", 5000) {
		return 0, fmt.Errorf("a part of a file: %d bytes, %w", len(text), err)
	}
	return number, nil
}

// ---- Killed and started again ----

func TestKilledBeforeTheMount(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	p := n.startProcess()
	v := n.volume()
	gate := n.api.hold("/connectors/")
	result := make(chan error)
	go func() { result <- v.publish() }()
	gate.await(1, "the publish is under way")
	p.kill()
	wantError(t, <-result, codes.Unavailable)
	v.wantNothing()
	gate.open()
	n.startProcess() // replaces the socket that is left
	v.mustPublish()
	v.wantClean()
}

func TestKilledDuringUpdates(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	names := []string{"a", "b", "c", "d", "e", "f"}
	change := func(i int) {
		data := []string{}
		for _, name := range names[:1+i%len(names)] {
			data = append(data, name, fmt.Sprintf("%d\n%s", i, strings.Repeat("x", 5000)))
		}
		n.api.put(gitClassOf(data...))
	}
	change(0)
	v := n.volume()
	published := 0
	for round := range 12 {
		p := n.startProcess()
		v.mustPublish()
		v.wantClean()
		updating := make(chan struct{})
		go func() {
			defer close(updating)
			for err := error(nil); err == nil; published++ {
				change(published)
				err = v.publish()
			}
		}()
		time.Sleep(time.Duration(round) * 3 / 2 * time.Millisecond) // another moment each time
		p.kill()
		n.conn.Close() // or the next call would wait for another driver
		<-updating
		if text := v.file("a"); len(text) < 5000 {
			t.Fatalf("round %d: after the kill a file has %d bytes", round, len(text))
		}
	}
	n.startProcess()
	v.mustPublish()
	v.wantClean()
	generation, err := generationOf(v.file("a"))
	must(t, err)
	v.wantFiles(names[:1+generation%len(names)]...)
	for name, text := range v.read() {
		if got, err := generationOf(text); got != generation {
			t.Errorf("%s is of generation %d, not %d (%v)", name, got, generation, err)
		}
	}
	v.mustUnpublish()
}

func TestRestartKeepsVolumes(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	p := n.startProcess()
	v := n.volume()
	v.mustPublish()
	container := startContainer(t, v)
	wantUnchanged := v.unchangedFromNow()
	p.kill()
	v.want("token", v.pod.token)
	n.startProcess()
	v.mustPublish()
	v.wantClean()
	wantUnchanged()
	n.api.put(connector("default", "git", "git", with("https://changed", "spec", "address")))
	v.mustPublish()
	if text, err := os.ReadFile(container + "/.gitconfig"); !strings.Contains(string(text), "https://changed") {
		t.Errorf("the container sees %q, %v", text, err)
	}
	v.mustUnpublish()
}

// What somebody else has mounted at the target path is unmounted by unpublish, as ever, and never emptied: neither
// under our mount nor over it, whatever its files are called, not even with the device number that ours had.
func TestForeignTmpfsIsNotEmptied(t *testing.T) {
	t.Parallel()
	over := func(t *testing.T, n *node, v *podVolume) { must(t, unix.Mount(mountSource, v.target, "tmpfs", 0, "")) }
	for what, mount := range sorted(map[string]func(*testing.T, *node, *podVolume){
		"instead": func(t *testing.T, n *node, v *podVolume) {
			must(t, os.Mkdir(v.target, 0o755))
			over(t, n, v)
		},
		"over ours": func(t *testing.T, n *node, v *podVolume) {
			v.mustPublish()
			over(t, n, v)
		},
		"over ours, with a driver started since": func(t *testing.T, n *node, v *podVolume) {
			v.mustPublish()
			must(t, unix.Mount("foreign", v.target, "tmpfs", 0, ""))
			n.stop()
			n.start()
		},
		"in the place of ours": func(t *testing.T, n *node, v *podVolume) {
			v.mustPublish()
			var before, after unix.Stat_t
			must(t, unix.Stat(v.target, &before))
			must(t, unix.Unmount(v.target, 0))
			over(t, n, v)
			must(t, unix.Stat(v.target, &after))
			if after.Dev != before.Dev {
				t.Log("it has another device number")
			}
		},
	}) {
		for _, filled := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, filled: %v", what, filled), func(t *testing.T) {
				n := startNode(t)
				v := n.volume()
				mount(t, n, v)
				if filled {
					must(t, os.Mkdir(v.target+"/..gen-0123456789ab", 0o755))
					must(t, os.WriteFile(v.target+"/..gen-0123456789ab/name", []byte("precious"), 0o644))
					must(t, os.Symlink("..gen-0123456789ab", v.target+"/..data"))
					must(t, os.Symlink("..data/name", v.target+"/name"))
				}
				held, err := unix.OpenTree(unix.AT_FDCWD, v.target, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
				must(t, err)
				defer unix.Close(held)
				v.mustUnpublish()
				text, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d/name", held))
				if filled && (err != nil || string(text) != "precious") {
					t.Errorf("it has %q, %v", text, err)
				}
				if n.pinned() != 0 || n.used() != 0 {
					t.Errorf("%d bytes are counted, %d mounts kept", n.used(), n.pinned())
				}
			})
		}
	}
}
