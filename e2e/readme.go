package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

// What README.md shows is what is run: here it is read.

// step is a shell script that README.md shows.
type step block

// readmeSteps returns the scripts, fenced as sh, in one of README.md's sections. Of the section "Install"
// only the first counts: what follows is for other clusters than this one, but for what it says of old releases.
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
		if !knowsAllFields() {
			steps[0].text = strings.Replace(steps[0].text, "apply -f", "apply --validate=warn -f", 1)
		}
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
