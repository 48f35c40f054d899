package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"connectors-csi/e2e/image"
)

// What the tests and the command soak see of volumes, without the API server.

// kubeletPods is where kubelet has a directory for each Pod, by uid.
const kubeletPods = "/var/lib/kubelet/pods/"

// volumeDir is where a Pod's volume is mounted on the node.
func volumeDir(uid, volume string) string {
	return filepath.Join(kubeletPods, uid, "volumes/kubernetes.io~csi", volume, "mount")
}

// mounts returns the lines of the node's mount table for the CSI volumes of a Pod.
func mounts(uid string) []string {
	return mountsBelow(kubeletPods + uid + "/volumes/kubernetes.io~csi/")
}

// mountsBelow returns the lines of the node's mount table for what is mounted below a directory.
func mountsBelow(dir string) (lines []string) {
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

// podManifest is a Pod that does nothing and has a volume with these attributes on /volume. Further lines are more
// volumes, or fields of its spec. It has one second of grace, since sleep ignores the signal to end.
func podManifest(name, attributes string, fields ...string) string {
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

// bundles is where containerd has a directory for each container, by ID.
const bundles = "/run/containerd/io.containerd.runtime.v2.task/k8s.io"

// containerProcess returns the ID of a container's first process.
func containerProcess(id string) (pid int, err error) {
	content, err := os.ReadFile(filepath.Join(bundles, id, "init.pid"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(content)))
}
