package main

import (
	"fmt"
	"slices"
)

// importImages gives containerd the images of the driver, of the quick start's Pod and of the tests.
func (n *Node) importImages() error {
	driverName, err := imageIn("../deploy.yaml")
	if err != nil {
		return err
	}
	quickStartName, err := imageIn("../examples/git/pod.yaml")
	if err != nil {
		return err
	}
	driver, err := driverImage(driverName, n.path("connectors-csi"))
	if err != nil {
		return err
	}
	upgraded, err := driverImage(upgradeImage, n.path("connectors-csi"), file{name: "2", mode: 0o444})
	if err != nil {
		return err
	}
	busybox, err := busyboxFiles()
	if err != nil {
		return err
	}
	clients, err := clientFiles()
	if err != nil {
		return err
	}
	gitName, err := imageIn("../examples/proxy/client.yaml")
	if err != nil {
		return err
	}
	nginxName, err := imageIn("../examples/proxy/deployment.yaml")
	if err != nil {
		return err
	}
	proxyFiles, err := nginxFiles(n.path(targetCA))
	if err != nil {
		return err
	}
	nginx := here(nginxName, nil, proxyFiles)
	nginx.stopSignal = "SIGQUIT" // as the public image has it
	for _, i := range []image{
		// A Pod's sandbox needs a process that does nothing, to hold the Pod's namespaces.
		here(pauseImage, []string{"/bin/tail", "-f", "/dev/null"}, busybox),
		here(quickStartName, nil, busybox),
		here(clientImage, nil, slices.Concat(busybox, clients)),
		here(gitName, nil, slices.Concat(busybox, clients)),
		nginx,
		driver,
		upgraded,
	} {
		if err := importImage(i); err != nil {
			return fmt.Errorf("image %s: %w", i.name, err)
		}
	}
	return nil
}
