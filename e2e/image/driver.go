package image

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"connectors-csi/e2e/machine"
)

// The driver's image, which the command image writes.

var driverEntrypoint = []string{"/connectors-csi"} // as in the Dockerfile

// driverFiles are those of the driver's image.
func driverFiles(binary string) ([]File, error) {
	content, err := os.ReadFile(binary)
	return []File{{Name: "connectors-csi", Mode: 0o755, Content: content}}, err
}

// OfDriver returns an image of the driver for this machine, which may have more files.
func OfDriver(name, binary string, more ...File) (Image, error) {
	files, err := driverFiles(binary)
	return New(name, driverEntrypoint, append(files, more...)), err
}

// DriverVersion is the tag that deploy.yaml gives the driver's image.
func DriverVersion() (string, error) {
	name, err := NameIn("../deploy.yaml")
	if err != nil {
		return "", err
	}
	_, version, ok := strings.Cut(name[strings.LastIndex(name, "/")+1:], ":")
	if !ok {
		return "", fmt.Errorf("../deploy.yaml: the image %q has no tag", name)
	}
	return version, nil
}

// BuildDriver builds a static binary from the driver's sources in a directory, as its Dockerfile does.
func BuildDriver(sources, binary, arch, version string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags", "-s -w -buildid= -X main.version="+version, "-o", binary, ".")
	cmd.Dir = sources
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build of the driver: %w\n%s", err, out)
	}
	return nil
}

// Options are the flags of the command image.
type Options struct {
	platforms []string
	output    string
}

// ParseOptions reads the flags, and ends the process if they are wrong.
func ParseOptions(arguments []string) Options {
	o := Options{platforms: []string{"linux/amd64", "linux/arm64"}}
	flags := flag.NewFlagSet("image", flag.ExitOnError)
	flags.Func("platform", "platforms of the image (default linux/amd64,linux/arm64)", func(value string) error {
		o.platforms = strings.Split(value, ",")
		for _, platform := range o.platforms {
			if arch, ok := strings.CutPrefix(platform, "linux/"); !ok || arch == "" || strings.Contains(arch, "/") {
				return errors.New("a platform is linux/amd64, linux/arm64 or the like")
			}
		}
		return nil
	})
	flags.StringVar(&o.output, "o", "connectors-csi.tar", "write the archive to this file (relative to e2e)")
	flags.Parse(arguments)
	if flags.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "e2e: image takes flags only")
		os.Exit(2)
	}
	return o
}

// bomTool writes what a binary is made of, as CycloneDX.
const bomTool = "github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod@v1.10.0"

// Write writes the driver's image as an OCI archive, and beside it a bill of materials for each platform.
func Write(o Options) error {
	name, err := NameIn("../deploy.yaml")
	if err != nil {
		return err
	}
	version, err := DriverVersion()
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", machine.Prefix+"image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	driver := Image{Name: name, entrypoint: driverEntrypoint, files: map[string][]File{}}
	for _, platform := range o.platforms {
		binary := filepath.Join(work, strings.ReplaceAll(platform, "/", "-"))
		if err := BuildDriver("..", binary, strings.TrimPrefix(platform, "linux/"), version); err != nil {
			return err
		}
		if driver.files[platform], err = driverFiles(binary); err != nil {
			return err
		}
		bom := filepath.Join(filepath.Dir(o.output), "connectors-csi-"+filepath.Base(binary)+".cdx.json")
		if err := machine.Run("go", "run", bomTool, "bin", "-json", "-noserial", "-notimestamp", "-std", "-licenses",
			"-version", version,
			"-output", bom, binary); err != nil {
			return err
		}
		fmt.Println(bom)
	}
	archive, err := driver.archive()
	if err != nil {
		return err
	}
	if err := os.WriteFile(o.output, archive, 0o644); err != nil {
		return err
	}
	fmt.Printf("%s: %s for %s, %.1f MB\n", o.output, name, strings.Join(o.platforms, " and "), float64(len(archive))/1e6)
	return nil
}
