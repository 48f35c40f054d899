// Package readme reads README.md and docs: what they show is what is run.
package readme

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"connectors-csi/e2e/cluster"
)

// Step is a shell script that a page shows.
type Step Block

// Steps returns the scripts, fenced as sh, in a section of a page. That of the section "Install" is what the
// section says for old releases, if this is one.
func Steps(page, section string) ([]Step, error) {
	blocks, err := Blocks(page, section)
	if err != nil {
		return nil, err
	}
	var steps []Step
	for _, b := range blocks {
		if b.Language == "sh" {
			steps = append(steps, Step(b))
		}
	}
	if len(steps) == 0 {
		return nil, fmt.Errorf("%s has no section %q with a code block fenced as sh", page, section)
	}
	if section == "Install" && !cluster.KnowsAllFields() {
		steps[0].Text = strings.Replace(steps[0].Text, "apply -f", "apply --validate=warn -f", 1)
	}
	return steps, nil
}

// Block is a code block, with its page and the heading above it.
type Block struct{ page, Title, Language, Text string }

// Blocks returns the code blocks in a section of README.md or of a page of docs.
func Blocks(page, section string) ([]Block, error) {
	readme, err := os.ReadFile("../" + page)
	if err != nil {
		return nil, err
	}
	var blocks []Block
	var title string
	inBlock, inSection := false, false
	for line := range strings.Lines(string(readme)) {
		text := strings.TrimRight(line, "\n")
		switch {
		case inBlock && text == "```":
			inBlock = false
		case inBlock && inSection:
			blocks[len(blocks)-1].Text += line
		case inBlock:
		case strings.HasPrefix(text, "```"):
			inBlock = true
			if inSection {
				blocks = append(blocks, Block{page: page, Title: title, Language: strings.TrimPrefix(text, "```")})
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

// Run runs the script at the repository's root. One that looks for events is repeated until it sees the
// one that the page is about, since kubelet needs a second or two to report it.
func (s Step) Run() (output string, err error) {
	runOnce := func() error {
		cmd := exec.Command("bash", "-euo", "pipefail", "-c", s.Text)
		cmd.Dir = ".."
		out, err := cmd.CombinedOutput()
		output = string(out)
		if err != nil {
			return fmt.Errorf("%s, %q: %w\n%s", s.page, s.Title, err, out)
		}
		return nil
	}
	if !strings.Contains(s.Text, "kubectl events") {
		err = runOnce()
		return output, err
	}
	err = cluster.Await(2*time.Minute, func() error {
		if err := runOnce(); err != nil {
			return err
		}
		if !strings.Contains(output, "FailedMount") {
			return fmt.Errorf("%s, %q: no FailedMount event yet", s.page, s.Title)
		}
		return nil
	})
	return output, err
}
