package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"

	"connectors-csi/e2e/image"
	"connectors-csi/e2e/machine"
)

// What the tests and the command soak know of the driver.

// The driver and the deploy.yaml from which clusters are upgraded: those of the last commit before volumes and
// addresses had the limits of today.
const (
	OldCommit = "0427f7a"
	OldImage  = "localhost/connectors-csi:" + OldCommit
)

// oldDriver is where the old driver is kept.
func oldDriver() (binary string, err error) {
	cache, err := machine.CacheDir()
	return filepath.Join(cache, "connectors-csi-"+OldCommit), err
}

// BuildOldDriver builds the old driver from git's history, unless an earlier run did. The command calls it, since
// the node has no network.
func BuildOldDriver() error {
	binary, err := oldDriver()
	if err != nil || machine.Exists(binary) {
		return err
	}
	sources, err := os.MkdirTemp("", machine.Prefix+"sources-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(sources)
	archive := sources + "/driver.tar"
	if err := machine.Run("git", "-C", "..", "archive", "--output="+archive, OldCommit); err != nil {
		return fmt.Errorf("the upgrade's test needs git's history: %w", err)
	}
	if err := machine.Run("tar", "-xf", archive, "-C", sources); err != nil {
		return err
	}
	return image.BuildDriver(sources, binary, runtime.GOARCH, OldCommit)
}

// ForgetPolicy is what goes before the old deploy.yaml: the old driver's token requests have no label, and its
// deploy.yaml no policy that would take the place of the one that demands it.
var ForgetPolicy = []string{"delete", "validatingadmissionpolicybinding", "connectors-csi-token", "--ignore-not-found"}

// OldManifest is the old deploy.yaml, with the old driver's image, which it imports.
func OldManifest() (string, error) {
	path, err := oldDriver()
	if err != nil {
		return "", err
	}
	driver, err := image.OfDriver(OldImage, path)
	if err != nil {
		return "", err
	}
	if err := image.Import(driver); err != nil {
		return "", err
	}
	manifest, err := machine.Output("git", "-C", "..", "show", OldCommit+":deploy.yaml")
	return image.Field.ReplaceAllString(manifest+"\n", "        image: "+OldImage), err
}

var driverArgsList = regexp.MustCompile(`\n( *)args:\n(?: *- --.*\n)+`)

// WithArgs adds arguments for the driver to a deploy.yaml.
func WithArgs(content string, args ...string) (string, error) {
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
