package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"
)

// pages are all pages by their path.
func pages(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, pattern := range []string{"*.md", "docs/*.md", "examples/*/*.md"} {
		paths, err := filepath.Glob(pattern)
		must(t, err)
		for _, path := range paths {
			all[path] = readText(t, path)
		}
	}
	if len(all) < 12 {
		t.Fatalf("there are %d pages", len(all))
	}
	return all
}

func readText(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	must(t, err)
	return string(text)
}

// section is what stands on a page below a heading of the second level, up to the next.
func section(t *testing.T, page, title string) string {
	t.Helper()
	_, text, found := strings.Cut(readText(t, page), "\n## "+title+"\n")
	if !found {
		t.Fatalf("%s has no section %q", page, title)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	return text
}

// rows are the cells of all tables in a text, without the heads.
func rows(text string) (rows [][]string) {
	var previous string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "| ") && previous != "" && !strings.HasPrefix(line, "|---") {
			var cells []string
			for _, cell := range splitCells(line) {
				cells = append(cells, strings.TrimSpace(cell))
			}
			rows = append(rows, cells)
		}
		if strings.HasPrefix(line, "|---") {
			previous = line
		} else if !strings.HasPrefix(line, "|") {
			previous = ""
		}
	}
	return rows
}

// splitCells splits a line at the bars that have no backslash.
func splitCells(line string) []string {
	const bar = "\x00"
	cells := strings.Split(strings.ReplaceAll(strings.Trim(line, "|"), `\|`, bar), "|")
	for i := range cells {
		cells[i] = strings.ReplaceAll(cells[i], bar, `\|`)
	}
	return cells
}

var code = regexp.MustCompile("`([^`]+)`")

// quoted are the texts in backticks.
func quoted(text string) (all []string) {
	for _, match := range code.FindAllStringSubmatch(text, -1) {
		all = append(all, match[1])
	}
	return all
}

func TestREADMEIsShort(t *testing.T) {
	t.Parallel()
	if lines := strings.Count(readText(t, "README.md"), "\n"); lines > 220 {
		t.Errorf("README.md has %d lines, and may have 220", lines)
	}
}

// Every link of a page leads to a file that there is, and to a heading that the page there has.
func TestLinks(t *testing.T) {
	t.Parallel()
	all := pages(t)
	link := regexp.MustCompile(`\]\(([^()\s]+)\)`)
	linked, count := map[string]bool{}, 0
	for from, text := range sorted(all) {
		for _, match := range link.FindAllStringSubmatch(withoutBlocks(text), -1) {
			if strings.HasPrefix(match[1], "https://") {
				continue
			}
			count++
			path, anchor, hasAnchor := strings.Cut(match[1], "#")
			if path = filepath.Join(filepath.Dir(from), path); strings.HasPrefix(match[1], "#") {
				path = from
			}
			if from != path {
				linked[path] = true
			}
			if _, err := os.Stat(path); err != nil {
				t.Errorf("%s links to %s: %v", from, match[1], err)
			} else if hasAnchor && !slices.Contains(anchors(all[path]), anchor) {
				t.Errorf("%s links to %s, where the headings are %q", from, match[1], anchors(all[path]))
			}
		}
	}
	for path := range all {
		if !linked[path] && path != "README.md" {
			t.Errorf("no page links to %s", path)
		}
	}
	if count < 100 {
		t.Errorf("only %d links were found", count)
	}
}

// withoutBlocks leaves out code blocks and what stands in backticks, in which nothing is a link or a heading.
func withoutBlocks(text string) string {
	var b strings.Builder
	inBlock := false
	for line := range strings.Lines(text) {
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			inBlock = !inBlock
		} else if !inBlock {
			b.WriteString(line)
		}
	}
	return b.String()
}

// anchors are those that GitHub gives to the headings of a page.
func anchors(text string) (all []string) {
	for line := range strings.Lines(withoutBlocks(text)) {
		level := strings.TrimLeft(line, "#")
		if level == line || !strings.HasPrefix(level, " ") {
			continue
		}
		anchor := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case unicode.IsLetter(r), unicode.IsDigit(r), r == '-', r == '_':
				return unicode.ToLower(r)
			}
			return -1
		}, strings.TrimSpace(level))
		all = append(all, anchor)
	}
	return all
}

// What README.md says that its first command prints is what it prints.
func TestPreviewOfTheREADME(t *testing.T) {
	t.Parallel()
	block := regexp.MustCompile("(?s)```bash\ngo run \\. (render [^\n]+) < " +
		"(examples/[a-z]+\\.json)\n```\n\n```text\n(.*?)```").
		FindStringSubmatch(readText(t, "README.md"))
	if block == nil {
		t.Fatal("README.md has no preview with what it prints")
	}
	stdout, stderr, code := runRenderOn(readText(t, block[2]), strings.Fields(block[1])[1:]...)
	if stdout != block[3] || stderr != "" || code != 0 {
		t.Errorf("exit code %d, on standard error %q, and on standard output\n%s\nREADME.md shows\n%s", code, stderr, stdout,
			block[3])
	}

	// The volume and the file above it are those of the same example.
	first := regexp.MustCompile("(?s)```yaml\n(volumes:\n.*?)```.*?```text\n(.*?)```").FindStringSubmatch(readText(t,
		"README.md"))
	if first == nil {
		t.Fatal("README.md shows no volume and its file")
	}
	for line := range strings.Lines(first[1]) {
		if !strings.Contains(readText(t, "examples/git/pod.yaml"), "  "+line) {
			t.Errorf("examples/git/pod.yaml has no line %q", line)
		}
	}
	credential := regexp.MustCompile("Basic .*")
	if file := credential.ReplaceAllString(first[2], "Basic OlRPS0VO"); !strings.Contains(block[3], file) {
		t.Errorf("the file is not the one that is printed, but\n%s", file)
	}
}

// Every class of examples is linked to from the table of tools, and the alerts are the same text on the page.
func TestExamplesAreDocumented(t *testing.T) {
	t.Parallel()
	classes, err := filepath.Glob("examples/*/class.yaml")
	if err != nil || len(classes) < 8 {
		t.Fatalf("%q, %v", classes, err)
	}
	tools := section(t, "docs/proxy.md", "Tools")
	for _, class := range classes {
		if link := "(../" + filepath.Dir(class) + ")"; !strings.Contains(tools, link) {
			t.Errorf("docs/proxy.md does not link to %s", link)
		}
	}
	if !strings.Contains(section(t, "docs/operations.md", "Alerts"), "\n"+readText(t, "examples/alerts.yaml")) {
		t.Error("docs/operations.md does not show examples/alerts.yaml as it is")
	}
}

// The parameters, flags and metrics that the pages have are those of the driver, and the defaults as well.
func TestReferenceIsComplete(t *testing.T) {
	t.Parallel()
	names := func(page, title, prefix string) (names []string) {
		for _, row := range rows(section(t, page, title)) {
			for _, name := range quoted(row[0]) {
				if strings.HasPrefix(name, prefix) {
					names = append(names, name)
				}
			}
		}
		return slices.Sorted(slices.Values(names))
	}
	want := func(what string, documented, have []string) {
		t.Helper()
		if slices.Sort(have); !slices.Equal(documented, have) {
			t.Errorf("%s: documented are %q, and there are %q", what, documented, have)
		}
	}
	documented := names("README.md", "Parameters", "")
	want("attributes", documented, append(slices.Clone(knownAttributes), "readOnly", "driver"))

	help := exec.Command(rendererBinary(), "--help")
	help.Env = []string{roleKey + "=" + roleDriver}
	usage, err := help.CombinedOutput()
	must(t, err)
	var flags []string
	for _, match := range regexp.MustCompile(`(?m)^  -([a-z-]+)`).FindAllStringSubmatch(string(usage), -1) {
		if match[1] != "test" { // those of the package testing
			flags = append(flags, "--"+match[1])
		}
	}
	want("flags", names("docs/operations.md", "Flags", "--"), flags)
	for _, row := range rows(section(t, "docs/operations.md", "Flags")) {
		name, value := quoted(row[0])[0], strings.Join(quoted(row[1]), "")
		_, of, _ := strings.Cut(string(usage), "\n  -"+strings.TrimPrefix(name, "--"))
		of, _, _ = strings.Cut(strings.ReplaceAll(of, "1m0s", "1m"), "\n  -")
		if value != "" && value != "$NODE_NAME" && !strings.Contains(strings.ReplaceAll(of, `"`, ""), "(default "+value+")") {
			t.Errorf("the default of %s is not %q: %s", name, value, of)
		}
	}

	_, text := startNode(t).get("/metrics")
	var metrics []string
	for _, match := range regexp.MustCompile(`(?m)^# TYPE ([a-z_]+)`).FindAllStringSubmatch(text, -1) {
		metrics = append(metrics, match[1])
	}
	want("metrics", names("docs/operations.md", "Health and metrics", "connectors_csi_"), metrics)
}

// The table of functions has each of them once, where the code has it.
func TestFunctionsAreDocumented(t *testing.T) {
	t.Parallel()
	var documented []string
	for _, row := range rows(section(t, "docs/templates.md", "Functions")) {
		names := quoted(row[0])
		slices.Sort(names)
		documented = append(documented, strings.Join(names, " "))
	}
	rest := slices.Concat(slices.Collect(maps.Keys(functions)), []string{"call", "ge", "gt", "le", "len", "lt"})
	rest = slices.DeleteFunc(rest, func(name string) bool {
		return strings.HasPrefix(name, "must") &&
			name != "must_date_modify"
	})
	groups := [][]string{}
	for _, f := range families {
		if group := strings.Fields(f.names); f.meet != nil || f.missing > 0 {
			rest = slices.DeleteFunc(rest, func(name string) bool { return slices.Contains(group, name) })
			if slices.Contains(group, "any") {
				group = append(group, "and", "eq", "ne", "not", "or")
			}
			groups = append(groups, group)
		}
	}
	for _, group := range append(groups, rest) {
		if slices.Sort(group); !slices.Contains(documented, strings.Join(group, " ")) {
			t.Errorf("docs/templates.md has no row with just the functions %q", group)
		}
	}
	if want := len(groups) + 1; len(documented) != want {
		t.Errorf("the table has %d rows, not %d", len(documented), want)
	}
}

// The figures in the table of limits are those of the code.
func TestLimitsAreDocumented(t *testing.T) {
	t.Parallel()
	limits := section(t, "docs/operations.md", "Limits")
	for _, want := range []string{
		fmt.Sprintf("| files of a volume | %d MiB in %d files; names of 1 to %d letters", maxVolumeBytes>>20, maxVolumeFiles,
			maxNameBytes),
		fmt.Sprintf("| %d KiB together; %d Connectors; %d configurations and %d exclusions of up to %d bytes",
			maxAttributeBytes>>10, maxConnectors, maxConfigurations, maxConfigurations, maxNameBytes),
		fmt.Sprintf("`nodePublishSecretRef`) | %d KiB |", maxRequestBytes>>10),
		fmt.Sprintf("| a token | %d KiB |", maxTokenBytes>>10),
		fmt.Sprintf("| volumes of a Pod | %d, and %d MiB of memory together", maxPodVolumes, maxPodMemory>>20),
		fmt.Sprintf("%.1f KiB for each file, link and directory, %d KiB for each volume", inodeMemory/1024.0,
			mountMemory>>10),
		fmt.Sprintf("| rendering a volume | %d MiB of memory, %.0f s of processor time, %.0f s in all |",
			renderMemory>>20, renderProcessorTime.Seconds(), renderTime.Seconds()),
		fmt.Sprintf("| a renderer | %d threads and processes", rendererThreads),
		fmt.Sprintf("%.0f s of processor time, of which %.0f s come back each minute", accountSize.Seconds(),
			60*accountRefill),
		fmt.Sprintf("for ten times as long, at most %.1f s", maxAllowance.Seconds()),
		fmt.Sprintf("not tried again for %.0f s, twice as long each time up to %.0f minutes", minPause.Seconds(),
			maxPause.Minutes()),
		fmt.Sprintf("; %s are remembered, %d for a namespace", thousands(maxOutcomes), maxNamespaceOutcomes),
		fmt.Sprintf("| a Connector or ConnectorClass | %d MiB of JSON", maxObjectBytes>>20),
		fmt.Sprintf("| the Connectors and ConnectorClasses of a volume | %d MiB together", maxVolumeObjectsBytes>>20),
		fmt.Sprintf("| %d MiB for the Pods of a namespace, %d MiB on a node |", maxNamespaceObjectsBytes>>20,
			maxObjectsBytes>>20),
		fmt.Sprintf("| the cache of objects | %d MiB;", maxCacheBytes>>20),
		fmt.Sprintf("| %d KiB for a Pod, %d MiB on a node |", maxPodKeptBytes>>10, maxKeptBytes>>20),
		fmt.Sprintf("| watches | %d for the Pods of a namespace, %d of classes, %d on a node |", maxNamespaceWatches,
			maxOwnWatches, maxWatches),
		fmt.Sprintf("| %d for the Pods of a namespace, %d on a node; %.0f s each.", maxNamespaceRequests, maxRequests,
			requestTimeout.Seconds()),
		fmt.Sprintf("| answers of the API server above %d KiB that are read at once | %d on a node", smallAnswerBytes>>10,
			maxLargeAnswers),
	} {
		if !strings.Contains(limits, want) {
			t.Errorf("docs/operations.md, Limits, does not say: %s", want)
		}
	}
}

// thousands writes a number with a comma.
func thousands(number int) string { return fmt.Sprintf("%d,%03d", number/1000, number%1000) }

// Each message on the page is one that the driver's code, or deploy.yaml, has.
func TestTroubleshootingHasTheDriversMessages(t *testing.T) {
	t.Parallel()
	have := readText(t, "deploy.yaml")
	for _, name := range []string{"main", "csi", "kube", "render", "mount"} {
		have += messagesOf(t, name+".go")
	}
	// What stands for a value, and where one error wraps another.
	variable := regexp.MustCompile(`…|[0-9][0-9a-z.]*|["<>{}:]|[a-z]+\.[a-z]+|\bconnectors ` +
		`|\.gitconfig|connectors-csi|ConnectorClass|(render|decod)ing it`)
	foreign := regexp.MustCompile(`^grpc: |ValidatingAdmissionPolicy`)
	count := 0
	for _, row := range rows(readText(t, "docs/troubleshooting.md")) {
		for _, message := range quoted(row[0]) {
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
	must(t, err)
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

// The modules on the page are those that are linked.
func TestLicencesAreListed(t *testing.T) {
	t.Parallel()
	info, ok := debug.ReadBuildInfo()
	if !ok || len(info.Deps) == 0 {
		t.Fatal("the test has no build information")
	}
	var linked, listed []string
	for _, module := range info.Deps {
		linked = append(linked, module.Path)
	}
	for _, row := range rows(section(t, "docs/security.md", "For auditors")) {
		if len(row) == 2 && regexp.MustCompile(`^[A-Z][A-Za-z0-9.-]+$`).MatchString(row[1]) {
			listed = append(listed, quoted(row[0])...)
		}
	}
	slices.Sort(linked)
	if slices.Sort(listed); !slices.Equal(linked, listed) {
		t.Errorf("linked are %q, and listed %q", linked, listed)
	}
}

// Each promise has a test, and each test that a promise names is there: of the driver in the second column, of the
// module e2e in the third, with a part of it after a slash. What else stands in backticks there is a step of .ci/run.
func TestPromisesHaveTests(t *testing.T) {
	t.Parallel()
	own, onNode, ci := testsIn(t, "."), testsIn(t, "e2e"), readText(t, ".ci/run")
	named, promises := map[string]bool{}, rows(section(t, "docs/security.md", "Promises"))
	for _, row := range promises {
		if len(row) != 3 || row[0] == "" || row[1]+row[2] == "" {
			t.Errorf("not a promise with tests: %q", row)
			continue
		}
		for i, tests := range []map[string]string{own, onNode} {
			for _, name := range quoted(row[i+1]) {
				name, part, isPart := strings.Cut(name, "/")
				file, ok := tests[name]
				switch {
				case !ok && !strings.HasPrefix(name, "Test") && !strings.HasPrefix(name, "Fuzz") && !isPart:
					ok = strings.Contains(ci, name)
				case ok && isPart:
					ok = strings.Contains(readText(t, file), strconv.Quote(part))
				}
				if !ok {
					t.Errorf("there is no %s/%s, for %q", name, part, row[0])
				}
				named[name] = true
			}
		}
	}
	if len(promises) < 60 || len(named) < 100 {
		t.Errorf("there are %d promises and %d tests", len(promises), len(named))
	}
}

// testsIn are the tests and fuzz tests below a directory, each with its file; of the root directory only its own.
func testsIn(t *testing.T, root string) map[string]string {
	t.Helper()
	tests := map[string]string{}
	must(t, filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && root == "." && path != ".":
			return fs.SkipDir
		case entry.IsDir() || !strings.HasSuffix(path, "_test.go"):
			return nil
		}
		source, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, d := range source.Decls {
			f, ok := d.(*ast.FuncDecl)
			if ok && f.Recv == nil && regexp.MustCompile(`^(Test|Fuzz)[A-Z]`).MatchString(f.Name.Name) &&
				f.Name.Name != "TestMain" {
				tests[f.Name.Name] = path
			}
		}
		return nil
	}))
	if len(tests) == 0 {
		t.Fatalf("no test was found in %s", root)
	}
	return maps.Clone(tests)
}
