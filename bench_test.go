package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
)

// ---- Figures: go test -run '^$' -bench . ----

// BenchmarkPublish publishes and unpublishes one volume.
func BenchmarkPublish(b *testing.B) {
	n := startNode(b)
	benchmarkPublish(n.volume())
}

func benchmarkPublish(v *podVolume) {
	b := v.t.(*testing.B)
	must(b, v.publish())
	must(b, v.unpublish())
	request := v.request()
	client := csi.NewNodeClient(v.node.conn)
	unpublish := &csi.NodeUnpublishVolumeRequest{VolumeId: request.VolumeId, TargetPath: v.target}
	for b.Loop() {
		_, err := client.NodePublishVolume(b.Context(), request)
		must(b, err)
		_, err = client.NodeUnpublishVolume(b.Context(), unpublish)
		must(b, err)
	}
}

// BenchmarkPublishWatched is BenchmarkPublish where another volume has the objects watched already.
func BenchmarkPublishWatched(b *testing.B) {
	n := startNode(b)
	n.volume().settle()
	benchmarkPublish(n.volume())
}

// BenchmarkPublish30 publishes 30 volumes at once, all in one namespace.
func BenchmarkPublish30(b *testing.B) { benchmarkPublish30(b, 1) }

// BenchmarkPublish30Namespaces is the same in 30 namespaces, each of which has a renderer of its own.
func BenchmarkPublish30Namespaces(b *testing.B) { benchmarkPublish30(b, 30) }

func benchmarkPublish30(b *testing.B, namespaces int) {
	n := startNode(b)
	volumes := make([]*podVolume, 30)
	for i := range volumes {
		volumes[i] = n.pod(fmt.Sprintf("team-%d/default", i%namespaces)).
			volume("config", attrs{"connector.namespace": "default"})
	}
	for b.Loop() {
		results := publishAtOnce(volumes)
		for range volumes {
			must(b, <-results)
		}
		b.StopTimer()
		for _, v := range volumes {
			v.mustUnpublish()
		}
		clear(n.driver.renderers.accounts) // for more than ten seconds of processor time
		b.StartTimer()
	}
}

// BenchmarkPublishFloor is what BenchmarkPublish cannot do without: the same two requests to the API server, and
// the same system calls, bare.
func BenchmarkPublishFloor(b *testing.B) { benchmarkFloor(b, func(csi.IdentityClient) {}) }

// BenchmarkPublishFloorWithCalls is the same with two empty calls, as kubelet makes two to publish and unpublish.
func BenchmarkPublishFloorWithCalls(b *testing.B) {
	benchmarkFloor(b, func(client csi.IdentityClient) {
		_, err := client.Probe(b.Context(), &csi.ProbeRequest{})
		must(b, err)
	})
}

func benchmarkFloor(b *testing.B, call func(csi.IdentityClient)) {
	n := startNode(b)
	identity := csi.NewIdentityClient(n.conn)
	v := n.volume()
	v.mustPublish()
	contents := v.read()
	v.mustUnpublish()
	client, own := n.driver.kube.client, driverToken()
	get := func(path, token string) {
		request, err := http.NewRequestWithContext(b.Context(), http.MethodGet, n.api.URL+path, nil)
		must(b, err)
		request.Header.Set("Authorization", "Bearer "+token)
		response, err := client.Do(request)
		must(b, err)
		_, err = io.ReadAll(response.Body)
		must(b, err)
		response.Body.Close()
	}
	for b.Loop() {
		get(connectorPath("default", "git"), v.pod.token)
		get(classPath("git"), own)
		mountBare(b, v.target, contents)
		call(identity)
		must(b, unix.Unmount(v.target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH))
		must(b, unix.Rmdir(v.target))
		call(identity)
	}
}

// mountBare mounts the files at the target path by nothing but system calls.
func mountBare(b *testing.B, target string, contents map[string]string) {
	conf, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	must(b, err)
	for _, option := range [][2]string{{"source", "connectors-csi"}, {"mode", "555"}, {"size", "6291456"},
		{"nr_inodes", "1032"}} {
		must(b, unix.FsconfigSetString(conf, option[0], option[1]))
	}
	unix.FsconfigSetFlag(conf, "noswap")
	must(b, unix.FsconfigCreate(conf))
	mount, err := unix.Fsmount(conf, unix.FSMOUNT_CLOEXEC,
		unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	must(b, err)
	unix.Close(conf)
	must(b, unix.Mkdirat(mount, "..gen", 0o755))
	generation, err := unix.Openat(mount, "..gen", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(b, err)
	for name, content := range contents {
		file, err := unix.Openat(generation, name, unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o400)
		must(b, err)
		_, err = unix.Write(file, []byte(content))
		must(b, err)
		must(b, unix.Fchmod(file, 0o444))
		unix.Close(file)
		must(b, unix.Symlinkat("..data/"+name, mount, name))
	}
	unix.Close(generation)
	must(b, unix.Symlinkat("..gen", mount, "..data_tmp"))
	must(b, unix.Renameat(mount, "..data_tmp", mount, "..data"))
	must(b, unix.MountSetattr(mount, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}))
	must(b, unix.Mkdir(target, 0o750))
	must(b, unix.MoveMount(mount, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH))
	unix.Close(mount)
}

// BenchmarkProbe is an empty call over the same socket.
func BenchmarkProbe(b *testing.B) {
	n := startNode(b)
	client := csi.NewIdentityClient(n.conn)
	_, err := client.Probe(b.Context(), &csi.ProbeRequest{})
	must(b, err)
	for b.Loop() {
		_, err := client.Probe(b.Context(), &csi.ProbeRequest{})
		must(b, err)
	}
}

func BenchmarkRepublishUnchanged(b *testing.B) {
	n := startNode(b)
	v := n.volume()
	v.mustPublish()
	asked := n.api.countFromNow("")
	request, client := v.request(), csi.NewNodeClient(n.conn)
	for b.Loop() {
		_, err := client.NodePublishVolume(b.Context(), request)
		must(b, err)
	}
	if asked() != 0 {
		b.Error("the API server was asked")
	}
}

func BenchmarkRepublishNewToken(b *testing.B) {
	n := startNode(b)
	v := n.volume()
	v.mustPublish()
	requests := []*csi.NodePublishVolumeRequest{v.request()}
	v.pod.renewToken()
	requests = append(requests, v.request())
	client, i := csi.NewNodeClient(n.conn), 0
	for b.Loop() {
		i++
		_, err := client.NodePublishVolume(b.Context(), requests[i%2])
		must(b, err)
	}
}

func BenchmarkRender(b *testing.B) {
	mounted := []mountedConnector{{connector("default", "git", "git"), gitClass()}}
	token := issue("default", "default", nil, time.Hour, apiAudience)
	for b.Loop() {
		_, err := render(mounted, selection{Configurations: []string{"config"}}, token, func(string) {})
		must(b, err)
	}
}

// BenchmarkRenderInRenderer is BenchmarkRender in a renderer that runs already.
func BenchmarkRenderInRenderer(b *testing.B) {
	n := startNode(b)
	n.volume().mustPublish()
	j := benchmarkJob(b)
	for b.Loop() {
		_, err := n.driver.renderers.render(b.Context(), "default", j)
		must(b, err)
	}
}

// BenchmarkRenderInNewRenderer is the same with one that has to be started, as for the first volume in a while.
func BenchmarkRenderInNewRenderer(b *testing.B) {
	n := startNode(b)
	j := benchmarkJob(b)
	for b.Loop() {
		n.endRenderers()
		clear(n.driver.renderers.accounts) // for more than ten seconds of processor time
		_, err := n.driver.renderers.render(b.Context(), "default", j)
		must(b, err)
	}
}

func benchmarkJob(b *testing.B) job {
	var objects []*apiObject
	for _, o := range []object{connector("default", "git", "git"), gitClass()} {
		text, err := json.Marshal(o)
		must(b, err)
		parsed, err := parseObject(text)
		must(b, err)
		objects = append(objects, parsed)
	}
	token := issue("default", "default", nil, time.Hour, apiAudience)
	return job{sources: []source{{objects[0], objects[1]}}, selection: selection{Configurations: []string{"config"}},
		token: token}
}

// BenchmarkPublishWith1000Volumes is BenchmarkPublish on a node that has 1,000 volumes already.
func BenchmarkPublishWith1000Volumes(b *testing.B) {
	n := startNode(b)
	for range 1000 {
		must(b, n.volume().publish())
	}
	benchmarkPublish(n.volume())
}

// releasedBinary builds the driver as it is released.
func releasedBinary(b *testing.B) string {
	binary := filepath.Join(b.TempDir(), "connectors-csi")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	return binary
}

// BenchmarkProcess is BenchmarkPublish with the driver as it is released: a static binary in a process of its own. It
// reports its resident memory, and its share (Pss) of that of the process and its renderers: after kubelet has
// registered it, after all the publishes, and when the renderers have ended.
func BenchmarkProcess(b *testing.B) {
	n := newNode(b)
	p := n.startBinary(releasedBinary(b))
	n.callRegistration("GetInfo", nil)
	n.callRegistration("NotifyRegistrationStatus", []byte{8, 1})
	n.wantReady(200, "ok")
	share := func() (megabytes float64) {
		for _, pid := range append(slices.Collect(maps.Keys(children(b, p.Process.Pid))), p.Process.Pid) {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
			must(b, err)
			kilobytes, err := strconv.ParseFloat(regexp.MustCompile(`Pss: +(\d+) kB`).FindStringSubmatch(string(text))[1], 64)
			must(b, err)
			megabytes += kilobytes * 1024 / 1e6
		}
		return megabytes
	}
	resident := func() float64 { return float64(kilobytes(b, p.Process.Pid, "VmRSS")) * 1024 / 1e6 }
	idle, idleShare := resident(), share()
	benchmarkPublish(n.volume())
	b.ReportMetric(idle, "MB-idle")
	b.ReportMetric(resident(), "MB-after")
	b.ReportMetric(idleShare, "MB-idle-share")
	b.ReportMetric(share(), "MB-after-share")
	eventually(b, "the renderers have ended", func() bool { return len(children(b, p.Process.Pid)) == 0 })
	b.ReportMetric(share(), "MB-alone-share")
}

// BenchmarkPush is from the change of a Connector to the file of a volume.
func BenchmarkPush(b *testing.B) {
	n := startNode(b)
	var took []time.Duration
	for b.Loop() {
		b.StopTimer()
		v := n.volume() // one that was just pushed would wait a second
		v.settle()
		n.awaitWatches(2)
		address := fmt.Sprintf("https://change-%d.example.com", len(took))
		b.StartTimer()
		began := time.Now()
		n.api.put(connector("default", "git", "git", with(address, "spec", "address")))
		for !strings.Contains(v.file(".gitconfig"), address) {
		}
		took = append(took, time.Since(began))
		b.StopTimer()
		v.mustUnpublish()
		b.StartTimer()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}

// BenchmarkStreams reports what 100 open streams take of the resident memory of the driver as it is released: the same
// 252 Connectors are mounted by the Pods of four namespaces, and by those of one, which may have 64 streams.
func BenchmarkStreams(b *testing.B) {
	var more []float64
	binary := releasedBinary(b)
	resident := func(namespaces, streams int) float64 {
		n := newNode(b)
		n.api.put(gitClassOf("file", "x"))
		p := n.startBinary(binary)
		defer p.kill()
		var volumes []*podVolume
		for i := range 12 {
			var names []string
			for j := range 21 {
				name := fmt.Sprintf("c-%d", 21*i+j)
				names = append(names, "default/"+name)
				n.api.put(connector("default", name, "git"))
			}
			pod := n.pod(fmt.Sprintf("team-%d/default", i%namespaces))
			volumes = append(volumes, pod.volume("config", attrs{"connector.name": "-", "connectors": strings.Join(names, ",")}))
		}
		for range 10 {
			for _, v := range volumes {
				v.pod.renewToken()
				v.mustPublish()
			}
		}
		n.awaitWatches(streams)
		eventually(b, "the renderers have ended", func() bool { return len(children(b, p.Process.Pid)) == 0 })
		return float64(kilobytes(b, p.Process.Pid, "VmRSS")) / 1024
	}
	for b.Loop() {
		watched := resident(4, 252+1) // with the class
		more = append(more, (watched-resident(1, 64+1))*100/(252-64))
	}
	slices.Sort(more)
	b.ReportMetric(more[len(more)/2], "MiB-per-100")
}
