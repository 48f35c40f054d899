// Command e2e starts a real single-node Kubernetes on this machine, without a container engine, and runs
// the driver on it: as a demonstration (quickstart), to try things out (up, kubectl), to measure it (scale), or to
// test it (go test).
package main

import (
	"flag"
	"fmt"
	"os"
	"strings"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/image"
	"connectors-csi/e2e/kernels"
	"connectors-csi/e2e/node"
	"connectors-csi/e2e/readme"
	"connectors-csi/e2e/scale"
	"connectors-csi/e2e/soak"
)

const usage = `usage, from the repository's root, as root:

  go -C e2e run . quickstart    start a node, install the driver, walk through the quick start of README.md and
                                docs/proxy.md
  go -C e2e run . up            start a node, install the driver, keep both until Ctrl-C
  go -C e2e run . soak …        kill and change things at random, and check what Pods see (--help: what can be set)
  go -C e2e run . kubectl …     run kubectl on the running node
  go -C e2e run . scale …       measure 1, 10 and 50 drivers at one API server (--help: what can be set)
  go -C e2e run . kernels …     try the driver on older and newer kernels and on arm64, in qemu (--help: what can be set)
  go -C e2e run . image …       write the driver's image as an archive, and its bills of materials (needs no root)
  go -C e2e run . dockerfile    build the Dockerfile and compare what it makes with what the image has
  go -C e2e test -v -timeout 80m ./...
                                start a node and run all tests on it (80m, since the first run builds Kubernetes)

quickstart and up take --kubernetes 1.30 and the like, and the tests E2E_KUBERNETES=1.30, for another release of
Kubernetes than the default; e2e/kubernetes has a directory for each.
`

func main() {
	command := ""
	if len(os.Args) > 1 {
		command = os.Args[1]
	}
	if command == "quickstart" || command == "up" {
		flags := flag.NewFlagSet(command, flag.ExitOnError)
		release := flags.String("kubernetes", os.Getenv(cluster.EnvRelease), "release of Kubernetes; the default is go.mod's")
		flags.Parse(os.Args[2:])
		os.Setenv(cluster.EnvRelease, *release)
	}
	switch command {
	case "quickstart":
		os.Exit(node.On(func(*node.Node) int { return report(quickstart()) }))
	case "up":
		code := node.On(func(n *node.Node) int { return report(up(n)) })
		if code == node.Interrupted {
			fmt.Println("The node has ended; nothing is left of it.")
			code = 0
		}
		os.Exit(code)
	case "soak":
		duration, seed := soak.ParseOptions(os.Args[2:])
		if err := cluster.BuildOldDriver(); err != nil {
			os.Exit(report(err))
		}
		os.Exit(node.On(func(n *node.Node) int { return report(soak.Run(n, duration, seed)) }))
	case "scale":
		options := scale.ParseOptions(os.Args[2:])
		os.Exit(node.On(func(n *node.Node) int { return report(scale.Run(n, options)) }))
	case "image":
		os.Exit(report(image.Write(image.ParseOptions(os.Args[2:]))))
	case "dockerfile":
		os.Exit(report(image.CheckDockerfile()))
	case "kernels":
		os.Exit(report(kernels.Run(os.Args[2:])))
	case "kubectl":
		os.Exit(report(node.ExecKubectl(os.Args[2:])))
	default:
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
}

// report prints an error and returns the exit code.
func report(err error) int {
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, "e2e:", err)
	return 1
}

// quickstart does what README.md and docs/proxy.md tell their reader to do, and shows it.
func quickstart() error {
	for _, at := range []struct{ page, section string }{
		{"README.md", "Install"}, {"README.md", "Quick start"}, {"docs/proxy.md", "Reach the target"},
	} {
		steps, err := readme.Steps(at.page, at.section)
		if err != nil {
			return err
		}
		for _, step := range steps {
			fmt.Printf("\n=== %s ===\n$ %s\n", step.Title, strings.ReplaceAll(step.Text, "\n", "\n  "))
			output, err := step.Run()
			fmt.Println(output)
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// up installs the driver and waits to be ended.
func up(n *node.Node) error {
	steps, err := readme.Steps("README.md", "Install")
	if err != nil {
		return err
	}
	for _, step := range steps {
		if output, err := step.Run(); err != nil {
			return fmt.Errorf("%w\n%s", err, output)
		}
	}
	fmt.Printf(`The driver is installed. In another terminal:

  go -C e2e run . kubectl get pods -A     (paths of files are relative to e2e)

Logs are in %s. Ctrl-C ends the node.
`, n.Dir)
	select {}
}
