// Command e2e starts a real single-node Kubernetes on this machine, without a container engine, and runs
// the driver on it: as a demonstration (quickstart), to try things out (up, kubectl), or to test it (go test).
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const usage = `usage, from the repository's root, as root:

  go -C e2e run . quickstart    start a node, install the driver, walk through README.md's quick start
  go -C e2e run . up            start a node, install the driver, keep both until Ctrl-C
  go -C e2e run . kubectl …     run kubectl on the running node
  go -C e2e test -v -timeout 60m ./...
                                start a node and run all tests on it (60m, since the first run builds Kubernetes)
`

func main() {
	command := ""
	if len(os.Args) > 1 {
		command = os.Args[1]
	}
	switch command {
	case "quickstart":
		os.Exit(onNode(func(*Node) int { return report(quickstart()) }))
	case "up":
		code := onNode(func(n *Node) int { return report(up(n)) })
		if code == interrupted {
			fmt.Println("The node has ended; nothing is left of it.")
			code = 0
		}
		os.Exit(code)
	case "kubectl":
		os.Exit(report(execKubectl(os.Args[2:])))
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

// quickstart does what README.md tells its reader to do, and shows it.
func quickstart() error {
	for _, section := range []string{"Install", "Quick start"} {
		steps, err := readmeSteps(section)
		if err != nil {
			return err
		}
		for _, step := range steps {
			fmt.Printf("\n=== %s ===\n$ %s\n", step.title, strings.ReplaceAll(step.text, "\n", "\n  "))
			output, err := step.run()
			fmt.Println(output)
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// up installs the driver and waits to be ended.
func up(n *Node) error {
	steps, err := readmeSteps("Install")
	if err != nil {
		return err
	}
	for _, step := range steps {
		if output, err := step.run(); err != nil {
			return fmt.Errorf("%w\n%s", err, output)
		}
	}
	fmt.Printf(`The driver is installed. In another terminal:

  go -C e2e run . kubectl get pods -A     (paths of files are relative to e2e)

Logs are in %s. Ctrl-C ends the node.
`, n.dir)
	select {}
}

// step is a shell script that README.md shows.
type step block

// readmeSteps returns the scripts, fenced as sh, in one of README.md's sections. Of the section "Install"
// only the first counts: what follows is for other clusters than this one.
func readmeSteps(section string) ([]step, error) {
	blocks, err := readmeBlocks(section)
	if err != nil {
		return nil, err
	}
	var steps []step
	for _, b := range blocks {
		if b.language == "sh" {
			steps = append(steps, step(b))
		}
	}
	if len(steps) == 0 {
		return nil, fmt.Errorf("README.md has no section %q with a code block fenced as sh", section)
	}
	if section == "Install" {
		steps = steps[:1]
	}
	return steps, nil
}

// block is one of README.md's code blocks, with the heading above it.
type block struct{ title, language, text string }

// readmeBlocks returns the code blocks in one of README.md's sections.
func readmeBlocks(section string) ([]block, error) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		return nil, err
	}
	var blocks []block
	var title string
	inBlock, inSection := false, false
	for line := range strings.Lines(string(readme)) {
		text := strings.TrimRight(line, "\n")
		switch {
		case inBlock && text == "```":
			inBlock = false
		case inBlock && inSection:
			blocks[len(blocks)-1].text += line
		case inBlock:
		case strings.HasPrefix(text, "```"):
			inBlock = true
			if inSection {
				blocks = append(blocks, block{title: title, language: strings.TrimPrefix(text, "```")})
			}
		case strings.HasPrefix(text, "## "):
			title = strings.TrimPrefix(text, "## ")
			inSection = title == section
		case strings.HasPrefix(text, "### "):
			title = strings.TrimPrefix(text, "### ")
		}
	}
	return blocks, nil
}

// run runs the script at the repository's root. One that looks for events is repeated until it sees the
// one that the README is about, since kubelet needs a second or two to report it.
func (s step) run() (output string, err error) {
	runOnce := func() error {
		cmd := exec.Command("bash", "-euo", "pipefail", "-c", s.text)
		cmd.Dir = ".."
		out, err := cmd.CombinedOutput()
		output = string(out)
		if err != nil {
			return fmt.Errorf("README.md, %q: %w\n%s", s.title, err, out)
		}
		return nil
	}
	if !strings.Contains(s.text, "kubectl events") {
		err = runOnce()
		return output, err
	}
	err = await(2*time.Minute, func() error {
		if err := runOnce(); err != nil {
			return err
		}
		if !strings.Contains(output, "FailedMount") {
			return fmt.Errorf("README.md, %q: no FailedMount event yet", s.title)
		}
		return nil
	})
	return output, err
}

// pointTo makes a node the one that execKubectl finds.
func pointTo(dir string, init int) error {
	link, err := runningNode()
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "pid"), fmt.Append(nil, init), 0o644); err != nil {
		return err
	}
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Symlink(dir, link)
}

// runningNode is the name of a link to the directory of the node that was started last.
func runningNode() (string, error) {
	cache, err := cacheDir()
	return filepath.Join(cache, "node"), err
}

// execKubectl becomes kubectl in the running node's network.
func execKubectl(args []string) error {
	dir, err := runningNode()
	if err != nil {
		return err
	}
	pid, err := os.ReadFile(filepath.Join(dir, "pid"))
	network := fmt.Sprintf("/proc/%s/ns/net", pid)
	if err != nil || !exists(network) {
		return errors.New("no node is running; start one with: go -C e2e run . up")
	}
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return err
	}
	os.Setenv("KUBECONFIG", filepath.Join(dir, "admin.kubeconfig"))
	command := append([]string{"nsenter", "--net=" + network, filepath.Join(dir, "bin", "kubectl")}, args...)
	return syscall.Exec(nsenter, command, os.Environ())
}
