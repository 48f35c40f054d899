package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"connectors-csi/e2e/image"
)

// What the tests and the command soak see of volumes, without the API server.

// KubeletPods is where kubelet has a directory for each Pod, by uid.
const KubeletPods = "/var/lib/kubelet/pods/"

// VolumeDir is where a Pod's volume is mounted on the node.
func VolumeDir(uid, volume string) string {
	return filepath.Join(KubeletPods, uid, "volumes/kubernetes.io~csi", volume, "mount")
}

// Mounts returns the lines of the node's mount table for the CSI volumes of a Pod.
func Mounts(uid string) []string {
	return MountsBelow(KubeletPods + uid + "/volumes/kubernetes.io~csi/")
}

// MountsBelow returns the lines of the node's mount table for what is mounted below a directory.
func MountsBelow(dir string) (lines []string) {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		panic(err) // there is no /proc
	}
	for line := range strings.Lines(string(table)) {
		// "36 35 98:0 / /mount/point ro,nosuid - tmpfs source rw"
		if strings.HasPrefix(strings.Fields(line)[4], dir) {
			lines = append(lines, line)
		}
	}
	return lines
}

// PodManifest is a Pod that does nothing and has a volume with these attributes on /volume. Further lines are more
// volumes, or fields of its spec. It has one second of grace, which it hardly takes.
func PodManifest(name, attributes string, fields ...string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: %s
    command: [sleep, infinity]
    volumeMounts:
    - {name: volume, mountPath: /volume}
  volumes:
  - name: volume
    csi: {driver: connectors-csi, readOnly: true, volumeAttributes: %s}
  %s
`, name, image.Client, attributes, strings.Join(fields, "\n  "))
}

// Bundles is where containerd has a directory for each container, by ID.
const Bundles = "/run/containerd/io.containerd.runtime.v2.task/k8s.io"

// ContainerProcess returns the ID of a container's first process.
func ContainerProcess(id string) (pid int, err error) {
	content, err := os.ReadFile(filepath.Join(Bundles, id, "init.pid"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(content)))
}
