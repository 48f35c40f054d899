package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// The quick start's objects and the alerts are the same text in README.md and in examples, and README.md names every
// directory there.
func TestExamplesAreThoseOfTheREADME(t *testing.T) {
	readme := readFile(t, "../README.md")
	paths, err := filepath.Glob("../examples/git/*.yaml")
	if err != nil || len(paths) != 4 {
		t.Fatalf("%q, %v", paths, err)
	}
	for _, path := range append(paths, "../examples/alerts.yaml") {
		if !strings.Contains(readme, "\n"+readFile(t, path)) {
			t.Errorf("README.md does not show %s as it is", path)
		}
	}
	classes, err := filepath.Glob("../examples/*/class.yaml")
	if err != nil || len(classes) < 8 {
		t.Fatalf("%q, %v", classes, err)
	}
	for _, class := range classes {
		if link := fmt.Sprintf("(%s)", strings.TrimPrefix(filepath.Dir(class), "../")); !strings.Contains(readme, link) {
			t.Errorf("README.md does not link to %s", link)
		}
	}
}

// Each message in the section "Troubleshooting" is one that the driver's code, or deploy.yaml, has.
func TestTroubleshootingHasTheDriversMessages(t *testing.T) {
	have := readFile(t, "../deploy.yaml")
	for _, name := range []string{"main", "csi", "kube", "render", "mount"} {
		have += messagesOf(t, "../"+name+".go")
	}
	_, section, _ := strings.Cut(readFile(t, "../README.md"), "\n## Troubleshooting\n")
	section, _, _ = strings.Cut(section, "\n## ")
	span := regexp.MustCompile("`[^`]+`")
	// What stands for a value, and where one error wraps another.
	variable := regexp.MustCompile(`…|[0-9][0-9a-z.]*|["<>{}:]|[a-z]+\.[a-z]+|\bconnectors |\.gitconfig|connectors-csi|ConnectorClass|(render|decod)ing it`)
	foreign := regexp.MustCompile(`^grpc: |ValidatingAdmissionPolicy`)
	count := 0
	for line := range strings.Lines(section) {
		if !strings.HasPrefix(line, "| `") {
			continue
		}
		for _, message := range span.FindAllString(strings.Split(line, " | ")[0], -1) {
			message = strings.Trim(message, "`")
			if !strings.Contains(message, " ") || foreign.MatchString(message) { // a code, or somebody else's
				continue
			}
			for _, part := range variable.Split(message, -1) {
				if part = strings.Trim(part, " :;,"); len(part) < 8 {
					continue
				}
				if count++; !strings.Contains(have, part) {
					t.Errorf("no message of the driver has %q, of %q", part, message)
				}
			}
		}
	}
	if count < 50 {
		t.Errorf("only %d parts of messages were found", count)
	}
}

// messagesOf returns the texts in a source file, each sum of them as one.
func messagesOf(t *testing.T, path string) string {
	t.Helper()
	source, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	ast.Inspect(source, func(n ast.Node) bool {
		if e, ok := n.(ast.Expr); ok {
			if text := textOf(e); text != "" {
				all.WriteString(text + "\n")
				return false
			}
		}
		return true
	})
	return all.String()
}

func textOf(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		text, _ := strconv.Unquote(e.Value)
		return text
	case *ast.BinaryExpr:
		return textOf(e.X) + textOf(e.Y)
	}
	return ""
}

// The examples of README.md's section "More than one" on a real node: the classes, the volumes, and what their
// files hold. A "…" there stands for the rest of a token.
func TestExamplesOfTheREADME(t *testing.T) {
	begin(t, "--builtin-files")
	ns, team := namespace{t, "default"}, namespace{t, "team-a"} // as the section has them
	ns.kubectl("create", "namespace", team.name)
	t.Cleanup(func() { kubectl("delete", "namespace", team.name, "--wait=false") })
	examples, err := readmeExamples("More than one")
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

func readmeExamples(section string) (map[string]*example, error) {
	blocks, err := readmeBlocks(section)
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
		ns.Fatalf("README.md has no example with a volume and the content of %s", file)
	}
	manifest := podManifest(pod, "{}")
	manifest = manifest[:strings.Index(manifest, "  volumes:")] + "  " + strings.ReplaceAll(strings.TrimSpace(e.volumes), "\n", "\n  ") + "\n"
	ns.apply(strings.Replace(manifest, "name: volume,", "name: "+volumeName.FindStringSubmatch(e.volumes)[1]+",", 1))
	ns.Cleanup(func() { kubectl("delete", "pod", pod, "--wait=false") })
	ns.running(pod)
	pattern := strings.ReplaceAll(regexp.QuoteMeta(strings.TrimSpace(e.content)), "…", `[-_.=a-zA-Z0-9]+`)
	if got := ns.read(pod, "/volume/"+file); !regexp.MustCompile(`^` + pattern + `\s*$`).MatchString(got) {
		ns.Errorf("%s in Pod %s is\n%s\nREADME.md shows\n%s", file, pod, got, e.content)
	}
}
