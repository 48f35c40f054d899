package node

import (
	"fmt"
	"slices"

	"connectors-csi/e2e/image"
)

// importImages gives containerd the images of the driver, of the quick start's Pod and of the tests.
func (n *Node) importImages() error {
	driverName, err := image.NameIn("../deploy.yaml")
	if err != nil {
		return err
	}
	quickStartName, err := image.NameIn("../examples/git/pod.yaml")
	if err != nil {
		return err
	}
	driver, err := image.OfDriver(driverName, n.Path("connectors-csi"))
	if err != nil {
		return err
	}
	upgraded, err := image.OfDriver(image.Upgrade, n.Path("connectors-csi"), image.File{Name: "2", Mode: 0o444})
	if err != nil {
		return err
	}
	busybox, err := image.BusyboxFiles()
	if err != nil {
		return err
	}
	clients, err := image.ClientFiles()
	if err != nil {
		return err
	}
	gitName, err := image.NameIn("../examples/proxy/client.yaml")
	if err != nil {
		return err
	}
	nginxName, err := image.NameIn("../examples/proxy/deployment.yaml")
	if err != nil {
		return err
	}
	proxyFiles, err := image.NginxFiles(n.Path(TargetCA))
	if err != nil {
		return err
	}
	nginx := image.New(nginxName, nil, proxyFiles)
	nginx.StopSignal = "SIGQUIT" // as the public image has it
	client := image.New(image.Client, nil, slices.Concat(busybox, clients))
	client.StopSignal = "SIGKILL" // sleep ignores others, so that each Pod's end would take its grace period
	for _, i := range []image.Image{
		// A Pod's sandbox needs a process that does nothing, to hold the Pod's namespaces.
		image.New(image.Pause, []string{"/bin/tail", "-f", "/dev/null"}, busybox),
		image.New(quickStartName, nil, busybox),
		client,
		image.New(gitName, nil, slices.Concat(busybox, clients)),
		image.New(image.Release10, nil, busybox),
		nginx,
		driver,
		upgraded,
	} {
		if err := image.Import(i); err != nil {
			return fmt.Errorf("image %s: %w", i.Name, err)
		}
	}
	return nil
}
