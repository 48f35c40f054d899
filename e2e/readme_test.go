package main

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// The examples of docs/templates.md on a real node: the classes, the volumes, and what their
// files hold. A "…" there stands for the rest of a token.
func TestExamplesOfSeveral(t *testing.T) {
	begin(t, "--builtin-files")
	ns, team := namespace{t, "default"}, namespace{t, "team-a"} // as the section has them
	ns.kubectl("create", "namespace", team.name)
	t.Cleanup(func() { kubectl("delete", "namespace", team.name, "--wait=false") })
	examples, err := readmeExamples("docs/templates.md", "More than one")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range examples {
		if e.class != "" {
			ns.apply(e.class)
		}
	}
	for _, c := range []struct {
		ns          namespace
		name, class string
	}{{team, "git-internal", "git-multi"}, {ns, "git-public", "git-multi"}, {ns, "npm", "npm-params"}} {
		c.ns.connector(c.name, c.class, "https://"+c.name+".example.com")
		c.ns.proxy("connector", c.name, fmt.Sprintf("http://c-%s.%s.svc.cluster.local", c.name, c.ns.name))
		t.Cleanup(func() { kubectl("delete", "connector", c.name, "--namespace", c.ns.name) })
	}
	ns.allow("default", ns)
	team.allow("default", ns)
	t.Cleanup(func() { kubectl("delete", "rolebinding", "default-default") })

	for title, want := range sorted(map[string]struct{ pod, file string }{
		"Several Connectors":            {"several-connectors", ".gitconfig"},
		"Parameters of a configuration": {"parameters", ".npmrc"},
		"Built-in files":                {"built-in-files", ".curlrc"},
	}) {
		ns.exampleHolds(want.pod, want.file, examples[title])
	}
}

// example is what one part of the section shows.
type example struct{ class, volumes, content string }

func readmeExamples(page, section string) (map[string]*example, error) {
	blocks, err := readmeBlocks(page, section)
	examples := map[string]*example{}
	for _, b := range blocks {
		e := examples[b.title]
		if e == nil {
			e = new(example)
			examples[b.title] = e
		}
		switch {
		case b.language == "text":
			e.content = b.text
		case strings.HasPrefix(b.text, "volumes:"):
			e.volumes = b.text
		default:
			e.class = b.text
		}
	}
	return examples, err
}

var volumeName = regexp.MustCompile(`(?m)^- name: (.*)$`)

// exampleHolds runs a Pod with the example's volume and compares the file with what the example shows.
func (ns namespace) exampleHolds(pod, file string, e *example) {
	ns.Helper()
	if e == nil || e.content == "" || !volumeName.MatchString(e.volumes) {
		ns.Fatalf("docs/templates.md has no example with a volume and the content of %s", file)
	}
	manifest := podManifest(pod, "{}")
	manifest = manifest[:strings.Index(manifest, "  volumes:")] + "  " + strings.ReplaceAll(strings.TrimSpace(e.volumes), "\n", "\n  ") + "\n"
	ns.apply(strings.Replace(manifest, "name: volume,", "name: "+volumeName.FindStringSubmatch(e.volumes)[1]+",", 1))
	ns.Cleanup(func() { kubectl("delete", "pod", pod, "--wait=false") })
	ns.running(pod)
	pattern := strings.ReplaceAll(regexp.QuoteMeta(strings.TrimSpace(e.content)), "…", `[-_.=a-zA-Z0-9]+`)
	if got := ns.read(pod, "/volume/"+file); !regexp.MustCompile(`^` + pattern + `\s*$`).MatchString(got) {
		ns.Errorf("%s in Pod %s is\n%s\ndocs/templates.md shows\n%s", file, pod, got, e.content)
	}
}
