package main

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"
)

// What the tests and the command soak know of the driver and of its volumes.

// The driver and the deploy.yaml from which clusters are upgraded: those of the last commit before volumes and
// addresses had the limits of today.
const (
	oldCommit = "0427f7a"
	oldImage  = "localhost/connectors-csi:" + oldCommit
)

func oldDriver() (binary string, err error) {
	cache, err := cacheDir()
	return filepath.Join(cache, "connectors-csi-"+oldCommit), err
}

// buildOldDriver builds the old driver from git's history, unless an earlier run did. The command calls it, since
// the node has no network.
func buildOldDriver() error {
	binary, err := oldDriver()
	if err != nil || os.Getenv(envProcess) != "" || exists(binary) {
		return err
	}
	sources, err := os.MkdirTemp("", prefix+"sources-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(sources)
	archive := sources + "/driver.tar"
	if err := run("git", "-C", "..", "archive", "--output="+archive, oldCommit); err != nil {
		return fmt.Errorf("the upgrade's test needs git's history: %w", err)
	}
	if err := run("tar", "-xf", archive, "-C", sources); err != nil {
		return err
	}
	return buildDriver(sources, binary, runtime.GOARCH, oldCommit)
}

// forgetPolicy is what goes before the old deploy.yaml: the old driver's token requests have no label, and its deploy.yaml
// no policy that would take the place of the one that demands it.
var forgetPolicy = []string{"delete", "validatingadmissionpolicybinding", "connectors-csi-token", "--ignore-not-found"}

// oldManifest is the old deploy.yaml, with the old driver's image, which it imports.
func oldManifest() (string, error) {
	path, err := oldDriver()
	if err != nil {
		return "", err
	}
	driver, err := driverFiles(path)
	if err != nil {
		return "", err
	}
	if err := importImage(here(oldImage, driverEntrypoint, driver)); err != nil {
		return "", err
	}
	manifest, err := output("git", "-C", "..", "show", oldCommit+":deploy.yaml")
	return imageField.ReplaceAllString(manifest+"\n", "        image: "+oldImage), err
}

var driverArgsList = regexp.MustCompile(`\n( *)args:\n(?: *- --.*\n)+`)

// withArgs adds arguments for the driver to a deploy.yaml.
func withArgs(content string, args ...string) (string, error) {
	manifest := driverArgsList.ReplaceAllStringFunc(content, func(list string) string {
		indent := driverArgsList.FindStringSubmatch(list)[1]
		for _, arg := range args {
			list += indent + "- " + arg + "\n"
		}
		return list
	})
	if len(args) > 0 && manifest == content {
		return "", errors.New("deploy.yaml has no list args to add to")
	}
	return manifest, nil
}

// httpGet returns the body of an answer that is a success. It does not wait long: a server may have gone without a word,
// as a Pod that is replaced does.
func httpGet(url string) (string, error) {
	client := http.Client{Timeout: 10 * time.Second}
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, response.Status, body)
	}
	return string(body), err
}

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

// claims are those of a ServiceAccount's token that the tests look at.
type claims struct {
	Audiences  []string `json:"aud"`
	Expires    int64    `json:"exp"`
	IssuedAt   int64    `json:"iat"`
	Kubernetes struct {
		Pod struct {
			UID string `json:"uid"`
		} `json:"pod"`
	} `json:"kubernetes.io"`
}

func (c claims) lifetime() time.Duration { return time.Duration(c.Expires-c.IssuedAt) * time.Second }

func parseClaims(token string) (c claims, err error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return c, errors.New("this is not a token") // which must not be printed, should it be one
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return c, err
	}
	err = json.Unmarshal(payload, &c)
	return c, err
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
`, name, clientImage, attributes, strings.Join(fields, "\n  "))
}
