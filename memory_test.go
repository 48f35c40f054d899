package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// ---- Memory of volumes ----

// sized is a class whose configuration "config" has the token in one file and so many bytes in another.
func sized(bytes int) object {
	return gitClassOf("token", "{{ .context.token }}", "large", fmt.Sprintf(`{{ repeat %d "x" }}`, bytes))
}

// mustMount mounts a volume as another process of the driver would have done it.
func mustMount(t testing.TB, target string, f files, who permissions) {
	t.Helper()
	_, err := mountVolume(target, f, who)
	must(t, err)
}

// usedAt is the memory that the volume at the target path takes.
func usedAt(t testing.TB, target string) int64 {
	t.Helper()
	at, err := look(target)
	must(t, err)
	return at.used
}

// used is what all volumes of the node take, by the driver's metrics.
func (n *node) used() int64 {
	n.t.Helper()
	return int64(n.readMetrics()["connectors_csi_volumes_bytes"])
}

// The driver's figure for files that are to be mounted is the one for the volume that holds them.
func TestMemoryIsKnownBeforeTheMount(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	target := n.volume().target
	many := files{}
	for i := range 256 {
		many[strconv.Itoa(i)] = nil
	}
	for what, f := range sorted(map[string]files{
		"none":            {},
		"empty":           {"a": nil},
		"a byte":          {"a": []byte("x")},
		"a page":          {"a": make([]byte, os.Getpagesize())},
		"a byte more":     {"a": make([]byte, os.Getpagesize()+1)},
		"long link":       {strings.Repeat("a", 120): nil},
		"longer link":     {strings.Repeat("a", 121): nil},
		"longest link":    {strings.Repeat("a", 253): []byte("x")},
		"256 empty files": many,
		"large":           {"a": make([]byte, 1<<20), "b": []byte("x")},
	}) {
		mustMount(t, target, f, permissions{mode: defaultMode})
		if need, used := f.charge(), usedAt(t, target); need != used {
			t.Errorf("%s: %d bytes, but it takes %d", what, need, used)
		}
		_, err := unmountVolume(target)
		must(t, err)
	}
}

// cgroup is one of the kernel's, which counts memory.
type cgroup struct {
	t            testing.TB
	dir          string
	usage, limit string // names of files
}

func newCgroup(t testing.TB) *cgroup {
	name := fmt.Sprintf("connectors-csi-test-%d-%d", os.Getpid(), serial.Add(1))
	c := &cgroup{t, "/sys/fs/cgroup/memory/" + name, "memory.usage_in_bytes", "memory.limit_in_bytes"}
	if err := os.Mkdir(c.dir, 0o755); err != nil {
		c = &cgroup{t, "/sys/fs/cgroup/" + name, "memory.current", "memory.max"}
		if err := os.Mkdir(c.dir, 0o755); err != nil {
			t.Skip("no cgroup can be made: ", err)
		}
	}
	t.Cleanup(func() { eventually(t, "the cgroup is removed", func() bool { return os.Remove(c.dir) == nil }) })
	if _, err := os.Stat(filepath.Join(c.dir, c.usage)); err != nil {
		t.Skip("the cgroup does not count memory: ", err)
	}
	return c
}

func (c *cgroup) write(file string, value int64) {
	must(c.t, os.WriteFile(filepath.Join(c.dir, file), []byte(strconv.FormatInt(value, 10)), 0o644))
}

// used is what the cgroup is charged for.
func (c *cgroup) used() int64 {
	text, err := os.ReadFile(filepath.Join(c.dir, c.usage))
	must(c.t, err)
	bytes, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	must(c.t, err)
	return bytes
}

// The memory that the kernel charges to the driver for volumes of 256 empty files, which have no blocks, is within
// what the driver counts, and at least half of it.
func TestMemoryIsWhatTheKernelCharges(t *testing.T) {
	group := newCgroup(t)
	n := newNode(t)
	var data []string
	for i := range 256 {
		data = append(data, fmt.Sprint("file-", i), "")
	}
	n.api.put(gitClassOf(data...))
	p := n.startProcess()
	defer p.kill()
	group.write("cgroup.procs", int64(p.Process.Pid))
	// charged is what the cgroup is charged for, less the process's own memory
	charged := func() int64 {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
		must(t, err)
		own, err := strconv.ParseInt(regexp.MustCompile(`RssAnon:\s+(\d+) kB`).FindStringSubmatch(string(text))[1], 10, 64)
		must(t, err)
		return group.used() - own<<10
	}
	next := 0
	publish := func() { // for several namespaces, since a slow processor empties the account of one
		next++
		pod := n.pod(fmt.Sprintf("namespace-%d/default", next/30))
		must(t, pod.volume("config", attrs{"connector.namespace": "default"}).publish())
	}
	for range 20 {
		publish()
	}
	before, usedBefore := charged(), n.used()
	for range 100 {
		publish()
	}
	got, counted := charged()-before, n.used()-usedBefore
	t.Logf("%d KiB are charged for a volume, and %d KiB counted", got/100>>10, counted/100>>10)
	if got > counted || got < counted/2 {
		t.Errorf("%d KiB are charged, and %d KiB counted", got>>10, counted>>10)
	}
}

func TestPodMayHave16Volumes(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	pod := n.pod()
	var volumes []*podVolume
	for i := range 17 {
		volumes = append(volumes, pod.volume(fmt.Sprint("v", i)))
	}
	for _, v := range volumes[:16] {
		v.mustPublish()
	}
	volumes[16].mustRefuse(codes.ResourceExhausted, "16 other volumes of connectors-csi", "may have 16")
	n.volume().mustPublish() // of another Pod
	volumes[3].mustUnpublish()
	volumes[16].mustPublish()
	volumes[3].mustRefuse(codes.ResourceExhausted)
	volumes[5].pod.renewToken()
	volumes[5].mustPublish()
}

func TestPodsVolumesHaveALimitTogether(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	n.api.put(sized(980 << 10))
	pod := n.pod()
	first, second, third := pod.volume("first"), pod.volume("second"), pod.volume("third")
	first.mustPublish()
	second.mustPublish()
	third.mustRefuse(codes.ResourceExhausted, "takes 1014 KiB of memory", "other volumes and old files take 2029 KiB",
		"may take 2048 KiB")
	n.volume().mustPublish() // of another Pod

	// Files may be replaced by as many, which leaves no room for the old ones beside them.
	pod.renewToken()
	first.mustPublish()
	first.want("token", pod.token)
	if generations, _ := filepath.Glob(first.target + "/..gen-*"); len(generations) != 1 {
		t.Errorf("generations %v", generations)
	}

	// They may not grow beyond the limit, and stay as they were.
	wantUnchanged := second.unchangedFromNow()
	n.api.put(sized(1010 << 10))
	n.age()
	wantError(t, second.publish(), codes.ResourceExhausted, "takes 1046 KiB of memory",
		"other volumes and old files take 1014 KiB")
	wantUnchanged()
	second.wantClean()
	n.api.put(sized(100 << 10))
	n.age()
	second.mustPublish()
	third.mustPublish()
}

// Volumes of one Pod that are published at once do not pass the limit together.
func TestPodsVolumesAtOnce(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(sized(500 << 10))
	pod := n.pod()
	results := make(chan error)
	for i := range 16 {
		v := pod.volume(fmt.Sprint("v", i))
		go func() { results <- v.publish() }()
	}
	published := 0
	for range 16 {
		if err := <-results; err == nil {
			published++
		} else {
			wantError(t, err, codes.ResourceExhausted, "other volumes and old files take")
		}
	}
	if published != 3 || len(mountsBelow(n.podsDir())) != 3 {
		t.Errorf("%d volumes of 534 KiB are published, and %d mounted, of at most 2 MiB", published,
			len(mountsBelow(n.podsDir())))
	}
}

// The node's budget: 1 MiB here, and volumes of 334.5 KiB.
func TestNodesBudget(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.api.noWatch = true
	n.api.put(sized(300 << 10))
	p := n.startBinary(rendererBinary(), "--refresh-interval=1ns", "--volumes-budget=1")
	volumes := []*podVolume{n.volume(), n.volume(), n.volume()}
	for _, v := range volumes {
		v.mustPublish()
	}
	v, refused := volumes[0], n.volume()
	words := []string{"takes 334 KiB of memory", "other volumes and old files take 1003 KiB", "may take 1024 KiB",
		"raise --volumes-budget"}
	refused.mustRefuse(codes.ResourceExhausted, words...)
	if got := n.readMetrics(); got["connectors_csi_volumes_bytes"] != 3*334.5*1024 ||
		got["connectors_csi_volumes_budget_bytes"] != 1<<20 || got["connectors_csi_volumes"] != 3 {
		t.Errorf("metrics %v", got)
	}

	// Tokens go on, even all at once.
	for _, v := range volumes {
		v.pod.renewToken()
	}
	results := publishAtOnce(volumes)
	for range volumes {
		must(t, <-results)
	}
	for _, v := range volumes {
		v.wantClean()
		v.want("token", v.pod.token)
		v.mustPublish() // sees that nobody has an old directory open: a process that is being started has, for a moment
	}

	// What grows beyond the budget is refused, and what grows within it is not.
	wantUnchanged := v.unchangedFromNow()
	n.api.put(sized(324 << 10))
	wantError(t, v.publish(), codes.ResourceExhausted, "takes 358 KiB of memory",
		"other volumes and old files take 669 KiB", "--volumes-budget")
	wantUnchanged()
	v.wantClean()
	n.api.put(sized(316 << 10))
	v.mustPublish()
	n.api.put(sized(300 << 10))
	v.mustPublish()

	// A driver that is started again knows the volumes, and not the subPath mounts.
	subPath := filepath.Join(n.podsDir(), v.pod.uid, "volume-subpaths/config/client/0")
	must(t, os.MkdirAll(subPath, 0o750))
	must(t, unix.Mount(v.target, subPath, "", unix.MS_BIND, ""))
	used := n.used()
	p.kill()
	n.startBinary(rendererBinary(), "--refresh-interval=1ns", "--volumes-budget=1")
	if got := n.readMetrics()["connectors_csi_volumes"]; got != 3 || n.used() != used {
		t.Errorf("after a restart there are %v volumes of %d bytes, and not 3 of %d", got, n.used(), used)
	}
	refused.mustRefuse(codes.ResourceExhausted, words...)
	volumes[1].mustUnpublish()
	refused.mustPublish()
}

// What an older driver has mounted beyond the limits is refreshed, by this one and the next.
func TestVolumesBeyondTheLimitsGoOn(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.api.put(sized(300 << 10))
	pod := n.pod()
	var volumes []*podVolume
	for i := range 20 {
		v := pod.volume(fmt.Sprint("v", i))
		mustMount(t, v.target, files{"token": []byte(pod.token), "large": bytes.Repeat([]byte("x"), 300<<10)},
			permissions{mode: defaultMode})
		volumes = append(volumes, v)
	}
	for range 2 {
		p := n.startBinary(rendererBinary(), "--refresh-interval=1ns", "--volumes-budget=1")
		for range 2 {
			pod.renewToken()
			for _, v := range volumes {
				v.mustPublish()
				v.want("token", pod.token)
			}
		}
		pod.volume("more").mustRefuse(codes.ResourceExhausted, "20 other volumes")
		n.volume().mustRefuse(codes.ResourceExhausted, "--volumes-budget")
		p.kill()
	}
	n.startProcess()
	for _, v := range volumes {
		v.mustUnpublish()
	}
	if used := n.used(); used != 0 {
		t.Errorf("%d bytes of no volumes", used)
	}
}

// A Pod that keeps old files open gets new ones until it is beyond its limit, and again when it has closed them. Here
// are two volumes of 1014 KiB each, so that there is room for no other.
func TestOldFilesThatAreOpenCount(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(sized(980 << 10))
	pod := n.pod()
	volumes := []*podVolume{pod.volume("first"), pod.volume("second")}
	var open []*os.File
	for _, v := range volumes {
		v.mustPublish()
		file, err := os.Open(v.target + "/large")
		must(t, err)
		open = append(open, file)
	}
	used := n.used()
	pod.renewToken()
	results := publishAtOnce(volumes)
	err := errors.Join(<-results, <-results) // one of them
	wantError(t, err, codes.ResourceExhausted)
	if err == nil || !strings.Contains(err.Error(),
		"983 KiB of it for old files that its containers have open or mount by subPath") {
		t.Errorf("no figures in: %v", err)
	}
	if got := usedAt(t, volumes[0].target) + usedAt(t, volumes[1].target); got > 3<<20 || n.used() != got {
		t.Errorf("%d KiB are held, and %d counted", got>>10, n.used()>>10)
	}
	for _, v := range volumes {
		v.wantClean()
	}
	for _, file := range open {
		file.Close()
	}
	for _, v := range volumes {
		v.publish() // sees that they are closed
	}
	for _, v := range volumes {
		v.mustPublish()
		v.want("token", pod.token)
	}
	if n.used() != used {
		t.Errorf("%d KiB are counted, and not %d", n.used()>>10, used>>10)
	}
}

// A Pod hands descriptors of its volume to somebody else, who keeps them when the Pod is gone, many Pods one after the
// other: of a file, of a directory, of the volume's root, of a mount of it, and each eighth of an old file. Only what
// an old file has cannot be given back; it is counted as long as it is kept, also beside a second driver. The memory
// that the driver may have is that of deploy.yaml with a smaller budget: 864 MiB, of which 480 are for 240 of volumes;
// here are 64 and no more.
func TestDescriptorsThatOutliveTheirPods(t *testing.T) {
	const budget, other = 64, 864 - 480
	pods := times(160, 400)
	group := newCgroup(t)
	n := newNode(t)
	n.api.put(sized(1000 << 10))
	start := func() *process {
		p := n.run(rendererBinary(), nil, "--refresh-interval=1ns", "--kubelet-dir="+n.dir, "--http-address=127.0.0.1:0",
			fmt.Sprint("--volumes-budget=", budget))
		group.write("cgroup.procs", int64(p.Process.Pid))
		n.http = n.awaitStart(p.log.String)
		n.dial()
		return p
	}
	n.api.set(func() { n.api.noWatch = true })
	group.write(group.limit, (budget+other)<<20)
	p := start()
	var kept []int
	defer func() {
		for _, descriptor := range kept {
			unix.Close(descriptor)
		}
	}()
	keep := func(path string, flags int) {
		t.Helper()
		descriptor, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		must(t, err)
		kept = append(kept, descriptor)
	}
	old, before := 0, int64(0)
	for i := range pods {
		v := n.volume()
		if err := v.publish(); err != nil {
			t.Fatalf("Pod %d: %v; the group is charged %d MiB", i, err, group.used()>>20)
		}
		switch i % 8 {
		case 0, 4:
			keep(v.target+"/large", unix.O_RDONLY)
		case 1, 5:
			keep(v.target+"/..data", unix.O_DIRECTORY)
		case 2, 6:
			keep(v.target, unix.O_DIRECTORY)
		case 3:
			mount, err := unix.OpenTree(unix.AT_FDCWD, v.target, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
			must(t, err)
			kept = append(kept, mount)
		case 7:
			keep(v.target+"/large", unix.O_RDONLY)
			v.pod.renewToken()
			must(t, v.publish())
			old++
		}
		must(t, v.unpublish())
		if i == 15 {
			before = group.used() - n.used()
		}
		if i == pods/2-1 { // in the middle of it
			p.kill()
			p = start()
		}
	}
	got := n.readMetrics()
	pinned := got["connectors_csi_volumes_bytes"]
	t.Logf("%d descriptors are kept; the group is charged %d MiB, of which the second driver counts %.0f for %d old "+
		"files; each descriptor costs %d KiB",
		len(kept), group.used()>>20, pinned/(1<<20), old/2, (group.used()-before-int64(old)*1000<<10)/int64(len(kept))>>10)
	if got["connectors_csi_volumes"] != 0 || pinned < float64(old/2*1000<<10) ||
		pinned > float64(len(kept)/2*(mountMemory+4*inodeMemory)+old/2*1010<<10) {
		t.Errorf("for %d old files that are kept the metrics are %v", old/2, got)
	}
	n.volume().mustPublish()
	p.wantSound(t)
}

// Every Pod of a node that is full keeps every old file while updates come. Beyond the node's budget each of them gets
// one update for which it lets go of nothing, so that all take at most twice the budget, which deploy.yaml has room
// for. A Pod that keeps none is refreshed all the time. Here is a tenth of a node, with Pods of two volumes of 1014 KiB
// each.
func TestOldFilesOfAWholeNode(t *testing.T) {
	t.Parallel()
	const pods = 11
	n := startNode(t, func(d *driver) { d.budget.limit = 24 << 20 })
	n.api.put(sized(980<<10), connector("default", "small", "small"),
		class("small", configuration("config", "token", "{{ .context.token }}")))
	innocent := n.volume(attrs{"connector.name": "small"})
	innocent.mustPublish()
	var volumes []*podVolume
	for range pods {
		pod := n.pod()
		volumes = append(volumes, pod.volume("first"), pod.volume("second"))
	}
	var open []*os.File
	release := func() {
		for _, file := range open {
			file.Close()
		}
		open = nil
	}
	defer release()
	most, refused := int64(0), 0
	for round := range 3 {
		for i, v := range volumes {
			if i%2 == 0 {
				v.pod.renewToken()
			}
			if err := v.publish(); err != nil {
				wantError(t, err, codes.ResourceExhausted, "old files that")
				refused++
			} else {
				file, err := os.Open(v.target + "/large")
				must(t, err)
				open = append(open, file)
			}
			most = max(most, n.used())
			innocent.pod.renewToken()
			innocent.mustPublish()
			innocent.want("token", innocent.pod.token)
		}
		t.Logf("round %d: %d MiB, at most %d; %d calls refused", round, n.used()>>20, most>>20, refused)
	}
	if limit := int64(pods * 3 << 20); most > limit || most < 24<<20 || refused < 2*pods {
		t.Errorf("the volumes take %d MiB, which may be %d; %d calls are refused", most>>20, limit>>20, refused)
	}
	release()
	for range 2 {
		for _, v := range volumes {
			v.publish() // sees that they are closed
		}
	}
	for _, v := range volumes {
		v.mustPublish()
		v.want("token", v.pod.token)
	}
}

// What is pinned is charged until it is let go of, and no longer.
func TestPinnedVolumesAreGivenBack(t *testing.T) {
	n := startNode(t)
	n.api.put(sized(500 << 10))
	v := n.volume()
	v.settle()
	v.mustUnpublish()
	n.awaitWatches(0)
	n.endRenderers()
	before := descriptors(t)
	for what, open := range sorted(map[string]struct {
		path string
		old  bool // is opened before an update
		kept int64
	}{
		"file":          {"/large", false, 0},
		"directory":     {"/..data", false, 0},
		"root":          {"", false, -1},
		"old file":      {"/large", true, 500 << 10},
		"old directory": {"/..data", true, 0},
	}) {
		v := n.volume()
		v.mustPublish()
		dir := startContainer(t, v)
		file, err := os.Open(dir + open.path)
		must(t, err)
		for range 2 { // after the second the first is gone, as it is a second after an update
			if open.old {
				v.pod.renewToken()
				v.mustPublish()
			}
		}
		must(t, unix.Unmount(dir, unix.MNT_DETACH))
		v.mustUnpublish()
		n.forgetUnmounted()
		used := n.used()
		if open.kept >= 0 && (used < open.kept+mountMemory || used > open.kept+mountMemory+4*inodeMemory) ||
			open.kept < 0 && used != 0 {
			t.Errorf("%s: %d KiB are counted", what, used>>10)
		}
		if open.path == "/large" {
			if size, err := io.Copy(io.Discard, file); err != nil || size != open.kept {
				t.Errorf("%s: it has %d bytes, %v", what, size, err)
			}
		}
		must(t, file.Close())
		n.awaitNothingPinned()
		if n.used() != 0 || len(n.driver.budget.pods) != 0 {
			t.Errorf("%s: %d bytes are counted when it is closed", what, n.used())
		}
	}
	n.endRenderers()
	eventually(t, fmt.Sprintf("there are %d descriptors as before", before),
		func() bool { return descriptors(t) <= before })
}

// Failed publishes take nothing, and neither does a volume that somebody has unmounted.
func TestBudgetIsGivenBack(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v, failing := n.volume(), n.volume()
	must(t, os.RemoveAll(filepath.Dir(failing.target)))
	failing.mustRefuse(codes.Internal)
	if used := n.used(); used != 0 {
		t.Errorf("a volume that is not mounted takes %d bytes", used)
	}
	v.mustPublish()
	used := n.used()
	n.forgetUnmounted()
	if used == 0 || n.used() != used {
		t.Errorf("a mounted volume takes %d bytes, and then %d", used, n.used())
	}
	must(t, unix.Unmount(v.target, unix.MNT_DETACH))
	n.forgetUnmounted()
	if used := n.used(); used != 0 {
		t.Errorf("a volume that somebody has unmounted takes %d bytes", used)
	}
	v.mustPublish()
	if n.used() != used {
		t.Errorf("mounted again it takes %d bytes, and not %d", n.used(), used)
	}

	// One that is just being mounted is not forgotten.
	next, err := n.driver.takeTurn(t.Context(), n.volume().target, "uid")
	must(t, err)
	defer n.driver.endTurn(next)
	_, err = n.driver.budget.reserve(next.memory, 0, 1<<20)
	must(t, err)
	n.forgetUnmounted()
	if n.used() != used+1<<20 {
		t.Errorf("%d bytes are set aside", n.used()-used)
	}
}

// What fails does not move the account: an update that finds something else over the volume, and an unpublish that
// cannot remove the directory of a volume whose old file somebody has open, however often kubelet tries it again.
func TestBudgetOfWhatFails(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(gitClassOf("large", "{{ .context.token }}"+strings.Repeat("x", 500<<10)))
	v := n.volume()
	must(t, os.Mkdir(v.target, 0o755))
	must(t, os.WriteFile(v.target+"/in-the-way", nil, 0o644))
	v.mustPublish()
	pods := func() map[string]total { return maps.Clone(n.driver.budget.pods) }
	before := pods()
	must(t, unix.Mount("/proc", v.target, "", unix.MS_BIND, ""))
	v.pod.renewToken()
	wantError(t, v.publish(), codes.FailedPrecondition, "did not mount")
	must(t, unix.Unmount(v.target, unix.MNT_DETACH))
	v.mustPublish()
	eventually(t, "the old files are gone", func() bool { return v.generations() == 1 })
	v.mustPublish() // sees what they have left
	if after := pods(); !maps.Equal(after, before) {
		t.Errorf("%v is counted, and not %v", after, before)
	}

	file, err := os.Open(v.target + "/large")
	must(t, err)
	for range 2 { // after the second the first is gone
		v.pod.renewToken()
		v.mustPublish()
	}
	for range 3 {
		wantError(t, v.unpublish(), codes.FailedPrecondition, "did not mount")
		if used := n.used(); n.pinned() != 1 || used > 500<<10+2*mountMemory {
			t.Errorf("%d bytes are counted for %d volumes", used, n.pinned())
		}
	}
	must(t, file.Close())
	n.awaitNothingPinned()
	must(t, os.Remove(v.target+"/in-the-way"))
	v.mustUnpublish()
	if used := n.used(); used != 0 {
		t.Errorf("%d bytes are counted at the end", used)
	}
}

// A sweep that was waiting while its volume was unpublished touches nothing of what is published there since.
func TestSweepOfDroppedRecord(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	v.mustPublish()
	must(t, os.Mkdir(v.writable()+"/..gen-next", 0o755))
	n.driver.sweep(&volume{target: v.target, memory: &footprint{}})
	if v.generations() != 2 {
		t.Error("it has removed a generation")
	}
	n.driver.sweep(v.record())
	if v.generations() != 1 {
		t.Error("the volume's own sweep has left a generation")
	}
}

// A scrape reads no list of mounts, so that no number of scrapers keeps a publish waiting. Here whoever opens the list
// waits for ever.
func TestMetricsDoNotReadMounts(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	p := n.startProcess()
	fifo := t.TempDir() + "/mountinfo"
	must(t, unix.Mkfifo(fifo, 0o600))
	list := fmt.Sprintf("/proc/%d/mountinfo", p.Process.Pid)
	must(t, unix.Mount(fifo, list, "", unix.MS_BIND, ""))
	defer unix.Unmount(list, unix.MNT_DETACH)
	scrapes := make(chan error)
	for range 64 {
		go func() {
			client := http.Client{Timeout: 20 * time.Second}
			response, err := client.Get("http://" + n.http + "/metrics")
			if err == nil {
				_, err = io.Copy(io.Discard, response.Body)
				response.Body.Close()
			}
			scrapes <- err
		}()
	}
	must(t, n.volume().publishWithin(20*time.Second))
	for range 64 {
		must(t, <-scrapes)
	}
	if got := n.readMetrics()["connectors_csi_volumes"]; got != 1 {
		t.Errorf("%v volumes", got)
	}
}

// A line of the list of mounts may be longer than 64 KiB, since a path may; all that comes after it is read as well.
func TestLongMountLine(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	dir, err := unix.Open(t.TempDir(), unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	for range 70 { // each space is written in four characters
		name := strings.Repeat(" ", 255)
		must(t, unix.Mkdirat(dir, name, 0o755))
		next, err := unix.Openat(dir, name, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(t, err)
		unix.Close(dir)
		dir = next
	}
	mount, err := newTmpfs()
	must(t, err)
	must(t, unix.MoveMount(mount, "", dir, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH))
	unix.Close(dir)
	defer unix.Close(mount)
	defer unix.Unmount(fmt.Sprintf("/proc/self/fd/%d", mount), unix.MNT_DETACH)
	text, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	if !slices.ContainsFunc(strings.Split(string(text), "\n"), func(line string) bool { return len(line) > 64<<10 }) {
		t.Fatal("there is no such line")
	}

	target := n.volume().target
	mustMount(t, target, files{"a": nil}, permissions{mode: defaultMode})
	mounts, err := readMounts()
	must(t, err)
	if !slices.ContainsFunc(mounts, func(m mountInfo) bool {
		return m.point == target && m.source == mountSource &&
			m.shared
	}) {
		t.Error("a mount after the long line is missing")
	}
	if !slices.ContainsFunc(mounts,
		func(m mountInfo) bool { return strings.HasSuffix(m.point, strings.Repeat(" ", 255)) }) {
		t.Error("the mount of the long line is missing")
	}
	n.startProcess()
	if got := n.readMetrics()["connectors_csi_volumes"]; got != 1 {
		t.Errorf("%v volumes", got)
	}
}
