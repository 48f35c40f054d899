package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"connectors-csi/e2e/cluster"
)

// What README.md and docs show is what is run: here it is read.

// step is a shell script that a page shows.
type step block

// readmeSteps returns the scripts, fenced as sh, in a section of a page. That of the section "Install" is what the
// section says for old releases, if this is one.
func readmeSteps(page, section string) ([]step, error) {
	blocks, err := readmeBlocks(page, section)
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
		return nil, fmt.Errorf("%s has no section %q with a code block fenced as sh", page, section)
	}
	if section == "Install" && !cluster.KnowsAllFields() {
		steps[0].text = strings.Replace(steps[0].text, "apply -f", "apply --validate=warn -f", 1)
	}
	return steps, nil
}

// block is a code block, with its page and the heading above it.
type block struct{ page, title, language, text string }

// readmeBlocks returns the code blocks in a section of README.md or of a page of docs.
func readmeBlocks(page, section string) ([]block, error) {
	readme, err := os.ReadFile("../" + page)
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
				blocks = append(blocks, block{page: page, title: title, language: strings.TrimPrefix(text, "```")})
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
// one that the page is about, since kubelet needs a second or two to report it.
func (s step) run() (output string, err error) {
	runOnce := func() error {
		cmd := exec.Command("bash", "-euo", "pipefail", "-c", s.text)
		cmd.Dir = ".."
		out, err := cmd.CombinedOutput()
		output = string(out)
		if err != nil {
			return fmt.Errorf("%s, %q: %w\n%s", s.page, s.title, err, out)
		}
		return nil
	}
	if !strings.Contains(s.text, "kubectl events") {
		err = runOnce()
		return output, err
	}
	err = cluster.Await(2*time.Minute, func() error {
		if err := runOnce(); err != nil {
			return err
		}
		if !strings.Contains(output, "FailedMount") {
			return fmt.Errorf("%s, %q: no FailedMount event yet", s.page, s.title)
		}
		return nil
	})
	return output, err
}
