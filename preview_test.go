package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// runRenderOn runs the released program with the text on standard input.
func runRenderOn(input string, arguments ...string) (stdout, stderr string, exitCode int) {
	var out, errors bytes.Buffer
	cmd := exec.Command(rendererBinary(), append([]string{"render"}, arguments...)...)
	cmd.Env = []string{roleKey + "=" + roleDriver}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &errors
	runCommand(cmd)
	return out.String(), errors.String(), cmd.ProcessState.ExitCode()
}

// What is no object of a cluster ends with one line, soon, and never with a panic.
func TestPreviewOfHostileInput(t *testing.T) {
	t.Parallel()
	const ours = `"apiVersion":"connectors.alauda.io/v1alpha1",`
	manyListsIn := func(before, after string, times int) string {
		return strings.Repeat(before, times) + "{}" + strings.Repeat(after, times)
	}
	for what, c := range sorted(map[string]struct{ input, stderr string }{
		"metadata twice": {`{` + ours + `"kind":"Connector","metadata":{"name":"x"},"metadata":5}`,
			"has no metadata.name"},
		"a number beyond all": {`{` + ours + `"kind":"Connector","metadata":{"name":"x"},"spec":1e700}`,
			`the Connector "x" on standard input: json: unsupported value`},
		"metadata is null":   {`{` + ours + `"kind":"Connector","metadata":null}`, "has no metadata.name"},
		"metadata is a list": {`{` + ours + `"kind":"Connector","metadata":["name"]}`, "has no metadata.name"},
		"metadata null afterwards": {`{` + ours + `"kind":"Connector","metadata":{"name":"x"},"metadata":null}`,
			"has no metadata.name"},
		"a class of nothing":  {`{` + ours + `"kind":"ConnectorClass"}`, "has no metadata.name"},
		"a number":            {`5`, "no Kubernetes object"},
		"null":                {`null`, "there is no Connector"},
		"a kind that is none": {`{"kind":{"a":1}}`, "no Kubernetes object"},
		"items are none":      {`{"kind":"List","items":{"a":1}}`, "no Kubernetes object"},
		"items are numbers":   {`{"kind":"List","items":[1,2]}`, "no Kubernetes object"},
		"lists in lists":      {manyListsIn(`{"kind":"List","items":[`, `]}`, 4000), "too many lists in one another"},
		"more of them":        {manyListsIn(`{"items":[`, `]}`, 100000), "exceeded max depth"},
		"a large list in lists": {manyListsIn(`{"items":[`, `]}`, 3000) + strings.Repeat(" ", 1<<20),
			"too many lists in one another"},
		"arrays":         {strings.Repeat("[", 1<<20), "exceeded max depth"},
		"half an object": {`{` + ours + `"kind":"Connector"`, "is not JSON"},
		"not JSON":       {"kind: Connector\n", "is not JSON"},
		"a binary file":  {"\x7fELF\x00\x01\x02", "is not JSON"},
		"nothing":        {"", "there is no Connector"},
		"bytes that are no text": {`{` + ours + `"kind":"Connector","metadata":{"name":"` + "\xff\xfe\x1b" + `"}}`,
			"is not JSON"},
	}) {
		t.Run(what, func(t *testing.T) {
			began := time.Now()
			stdout, stderr, code := runRenderOn(c.input, "--configuration.names=config")
			if stdout != "" || code != 1 || !strings.HasPrefix(stderr, "connectors-csi: ") || strings.Count(stderr, "\n") != 1 ||
				!strings.Contains(stderr, c.stderr) {
				t.Errorf("exit code %d, %q, and on standard error not %q but %.300q", code, stdout, c.stderr, stderr)
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
}

// An endless input ends the command when there is too much of it, not the machine.
func TestPreviewOfEndlessInput(t *testing.T) {
	t.Parallel()
	read, write, err := os.Pipe()
	must(t, err)
	go func() {
		defer write.Close()
		write.WriteString(`{"kind":"`)
		for block := bytes.Repeat([]byte("x"), 1<<20); err == nil; {
			_, err = write.Write(block)
		}
	}()
	cmd := exec.Command(rendererBinary(), "render", "--configuration.names=config")
	cmd.Env = []string{roleKey + "=" + roleDriver}
	cmd.Stdin = read
	text, _ := runCommand(cmd)
	read.Close()
	if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(text, "is not JSON of less than 64 MiB") {
		t.Errorf("exit code %d, %.300q", cmd.ProcessState.ExitCode(), text)
	}
}

// Nothing that an object says moves a terminal's cursor or makes a second line.
func TestPreviewErrorsArePrintable(t *testing.T) {
	t.Parallel()
	const escape = "\x1b]0;title\x07\x1b[2J\nconnectors-csi: all is well\r\u202e\u009b2J\x7f"
	git := class("git", configuration("config", "a", "A"),
		configuration("fail", "a", `{{ fail .connector.spec.address }}`), configuration("name", "a"+escape, "x"))
	one := connector("default", "one", "git", with("x"+escape, "spec", "params"))
	for what, c := range sorted(map[string]struct {
		objects   []object
		arguments []string
		word      string
	}{
		"an address": {[]object{git, connector("default", "one", "git",
			with("https://x"+escape, "spec", "address"))}, []string{"--configuration.names=config"}, "spec.address holds"},
		"what a template says": {[]object{gitClassOf("a", `{{ fail .connector.spec.params }}`), one},
			[]string{"--configuration.names=config"}, "all is well"},
		"a template": {[]object{gitClassOf("a", "{{ "+escape+" }}"), one}, []string{"--configuration.names=config"},
			"line 1"},
		"a file's name": {[]object{git, one}, []string{"--configuration.names=name"}, "is not allowed"},
		"an exclusion": {[]object{gitClassOf("a", "A", "b"+escape, "B"), one},
			[]string{"--configuration.names=config,!c"}, "is not allowed"},
		"a class's name": {[]object{git, connector("default", "one", "g"+escape)},
			[]string{"--configuration.names=config"}, "is not the name of a ConnectorClass"},
		"a configuration": {[]object{class("git", configuration("x"+escape)), one},
			[]string{"--configuration.names=config"}, "does not exist"},
		"another API": {[]object{git, connector("default", "one", "git", with("x"+escape, "apiVersion"))},
			[]string{"--configuration.names=config"}, "was passed over"},
		"checking all": {[]object{git, one, connector("default", "two"+escape, "git")}, []string{"--check"},
			"problems"},
	}) {
		t.Run(what, func(t *testing.T) {
			stdout, stderr, code := runRender(t, c.objects, c.arguments...)
			if code != 1 || !strings.Contains(stderr, c.word) || strings.Count(stderr, "\n") != 1 {
				t.Errorf("exit code %d, and on standard error %q", code, stderr)
			}
			if strings.ContainsAny(stdout+stderr, "\x1b\x07\r\u202e\u009b\x7f") {
				t.Errorf("a terminal would obey %q, %q", stdout, stderr)
			}
		})
	}
}

// What is in the directory already is neither followed nor written to.
func TestPreviewOutputDirectory(t *testing.T) {
	t.Parallel()
	dir, elsewhere := t.TempDir(), t.TempDir()
	git, one := gitClassOf("link", "1 {{ .context.token }}", "hard", "2", "open", "3", "dangling", "4", "new", "5", "same",
		"6"), connector("default", "one", "git")
	for _, name := range []string{"target", "hard", "kept"} {
		must(t, os.WriteFile(filepath.Join(elsewhere, name), []byte("kept"), 0o644))
	}
	must(t, os.Symlink(elsewhere+"/target", dir+"/link"))
	must(t, os.Link(elsewhere+"/hard", dir+"/hard"))
	must(t, os.WriteFile(dir+"/open", []byte("a much longer content"), 0o644))
	must(t, os.Symlink(elsewhere+"/none", dir+"/dangling"))
	must(t, os.WriteFile(dir+"/other", []byte("kept"), 0o644))
	for range 2 { // and once more
		if stdout, stderr, code := runRender(t, []object{git, one}, "--configuration.names=config", "--output-dir",
			dir); stdout+stderr != "" || code != 0 {
			t.Fatalf("exit code %d, %q, %q", code, stdout, stderr)
		}
	}
	for name, want := range sorted(map[string]string{"link": "1 TOKEN", "hard": "2", "open": "3", "dangling": "4",
		"new": "5", "same": "6"}) {
		text, err := os.ReadFile(filepath.Join(dir, name))
		must(t, err)
		if info, err := os.Lstat(filepath.Join(dir, name)); err != nil || info.Mode() != 0o600 || string(text) != want {
			t.Errorf("%s is %q, %v, %v", name, text, info.Mode(), err)
		}
	}
	for _, path := range []string{elsewhere + "/target", elsewhere + "/hard", elsewhere + "/kept", dir + "/other"} {
		if text, err := os.ReadFile(path); string(text) != "kept" {
			t.Errorf("%s is %q, %v", path, text, err)
		}
	}
	if _, err := os.Lstat(elsewhere + "/none"); err == nil {
		t.Error("a link was followed")
	}

	must(t, os.Remove(dir+"/new"))
	must(t, os.Mkdir(dir+"/new", 0o755))
	if _, stderr, code := runRender(t, []object{git, one}, "--configuration.names=config", "--output-dir",
		dir); code != 1 || !strings.Contains(stderr, dir+"/new: is a directory") {
		t.Errorf("exit code %d, %q", code, stderr)
	}
	must(t, os.Remove(dir+"/new"))
	must(t, unix.Mkfifo(dir+"/new", 0o600)) // which nobody reads
	if _, stderr, code := runRender(t, []object{git, one}, "--configuration.names=config", "--output-dir",
		dir); code != 0 {
		t.Errorf("exit code %d, %q", code, stderr)
	}
}

// Others have a kind of the name Connector too.
func TestPreviewKnowsItsAPI(t *testing.T) {
	t.Parallel()
	git, one := gitClassOf("a", "A"), connector("default", "one", "git")
	tailscale := connector("default", "two", "", with("tailscale.com/v1alpha1", "apiVersion"))
	unversioned := connector("default", "three", "git", with(nil, "apiVersion"))
	if stdout, stderr, code := runRender(t, []object{tailscale, git, one, unversioned},
		"--configuration.names=config"); stdout != "A" || stderr != "" || code != 0 {
		t.Errorf("exit code %d, %q, %q", code, stdout, stderr)
	}
	for _, c := range []struct {
		objects []object
		name    string
		stderr  string
	}{
		{[]object{git, tailscale}, "",
			`there is no Connector on standard input; a Connector with apiVersion "tailscale.com/v1alpha1" was passed over, ` +
				`since it is not connectors.alauda.io/v1alpha1`},
		{[]object{git, unversioned}, "", `a Connector with apiVersion "" was passed over`},
		{[]object{git, one, tailscale}, "two",
			`Connector "default/two" cannot be read: it is not in the input; a Connector with apiVersion ` +
				`"tailscale.com/v1alpha1" was passed over`},
		{[]object{class("git", configuration("config"))}, "", "there is no Connector on standard input\n"},
		{[]object{with2(git, "apiVersion", "connectors.alauda.io/v1"), one}, "",
			`it is not in the input; a ConnectorClass with apiVersion "connectors.alauda.io/v1" was passed over`},
	} {
		if stdout, stderr, code := runRender(t, c.objects, "--configuration.names=config",
			"--connector.name="+c.name); !strings.Contains(stderr, c.stderr) || stdout != "" || code != 1 {
			t.Errorf("exit code %d, %q, and on standard error not %q but %q", code, stdout, c.stderr, stderr)
		}
	}
}

// with2 is a copy of the object with another value of one field.
func with2(o object, field string, value any) object {
	c := deepCopy(o).(object)
	c[field] = value
	return c
}

// A preview refuses what a new volume may not have.
func TestPreviewHasTheLimitsOfAVolume(t *testing.T) {
	t.Parallel()
	objects := []object{gitClassOf("a", "A")}
	for i := range 33 {
		objects = append(objects, connector("default", fmt.Sprint("c", i), "git"))
	}
	token := filepath.Join(t.TempDir(), "token")
	must(t, os.WriteFile(token, bytes.Repeat([]byte("x"), 16<<10+1), 0o600))
	for _, c := range []struct {
		arguments []string
		stderr    string
	}{
		{[]string{"--configuration.names=config"}, "connectors may name 32 Connectors, not 33"},
		{[]string{"--configuration.names=config,config", "--connector.name=c1"}, `configuration.names has "config" twice`},
		{[]string{"--configuration.names=config", "--connector.name=c1", "--token.expiration=25h"},
			"token.expiration may be at most 24h0m0s"},
		{[]string{"--configuration.names=config", "--connector.name=c1", "--token-file=" + token}, "there is no token in " +
			token + ", of at most 16 KiB"},
	} {
		if stdout, stderr, code := runRender(t, objects, c.arguments...); !strings.Contains(stderr, c.stderr) ||
			stdout != "" || code != 1 {
			t.Errorf("exit code %d, %q, and on standard error not %q but %q", code, stdout, c.stderr, stderr)
		}
	}
}

// All classes and Connectors of a cluster are checked by one command.
func TestPreviewChecksACluster(t *testing.T) {
	t.Parallel()
	sound := class("sound", configuration("config", "a", "{{ .connector.spec.address }}"),
		with2(configuration("params", "p", "{{ .configurations.x }}"), "params", []any{param("x")}),
		with2(configuration("defaults", "p", "{{ .configurations.x }}"), "params", []any{param("x", "default", "y")}))
	broken := class("broken", configuration("good", "a", "A"), configuration("bad", "a", "x\n{{ .connector.spec.typo }}"),
		configuration("slow", "a", `{{ range until 100000000 }}{{ end }}`))
	one, two := connector("team-a", "one", "sound"), connector("team-b", "two", "broken")
	list := func(objects ...any) []object { return []object{{"kind": "List", "apiVersion": "v1", "items": objects}} }
	const needs = "connectors-csi: problems: 0; configurations that render: 2, that need configuration.params: 1\n"
	for _, c := range []struct {
		what           string
		objects        []object
		arguments      []string
		stdout, stderr string
	}{
		{"all is well", list(one, sound), nil, "", needs},
		{"with built-in files", list(one, sound), []string{"--builtin-files"}, "", needs},
		{"a Connector fails in one way for all configurations",
			list(connector("team-a", "one", "sound", with("a b", "spec", "address")), sound), nil,
			"team-a/one: Connector \"team-a/one\": spec.address holds ",
			"connectors-csi: problems: 1; configurations that render: 0, that need configuration.params: 0\n"},
		{"a certificate that was passed over before", list(connector("team-a", "one", "sound",
			with(certificate("a")+"-----BEGIN CERTIFICATE-----\n", "status", "proxy", "httpAddress", "CACerts")), sound), nil,
			"team-a/one: Connector \"team-a/one\": status.proxy.httpAddress.CACerts",
			"connectors-csi: problems: 1; configurations that render: 0, that need configuration.params: 0\n"},
		{"a type that was not looked at before", list(one, class("sound", with2(configuration("config", "a", "A"), "params",
			[]any{param("x", "type", "bool", "default", true)}))), nil,
			"team-a/one: ConnectorClass \"sound\", configuration \"config\": param \"x\" is declared with the type \"bool\"",
			"connectors-csi: problems: 1; configurations that render: 0, that need configuration.params: 0\n"},
		{"a class is missing", list(one, two, sound), nil,
			"team-b/two: ConnectorClass \"broken\" of Connector \"team-b/two\" cannot be read: it is not in the input\n",
			"connectors-csi: problems: 1; configurations that render: 2, that need configuration.params: 1\n"},
		{"names that cannot be", list(connector("a/b", "c/../d", "sound"),
			connector("", "e", "nothing", with("f", "metadata", "namespace")), sound), nil,
			"f/e: ConnectorClass \"nothing\" of Connector \"f/e\" cannot be read: it is not in the input\n",
			"connectors-csi: problems: 1; configurations that render: 2, that need configuration.params: 1\n"},
		{"no class is named", list(one, connector("team-b", "two", ""), sound), nil,
			"team-b/two: Connector \"team-b/two\": spec.connectorClassName \"\" is not the name of a ConnectorClass\n",
			"connectors-csi: problems: 1; configurations that render: 2, that need configuration.params: 1\n"},
	} {
		t.Run(c.what, func(t *testing.T) {
			stdout, stderr, code := runRender(t, c.objects, append([]string{"--check"}, c.arguments...)...)
			lines := min(len(c.stdout), 1)
			if !strings.HasPrefix(stdout, c.stdout) || strings.Count(stdout, "\n") != lines || stderr != c.stderr ||
				code != lines {
				t.Errorf("exit code %d, %q, and on standard error %q", code, stdout, stderr)
			}
		})
	}

	// Templates that take all that they may do not use up what the others have.
	var objects []any
	for i := range 8 {
		objects = append(objects, connector("team-b", fmt.Sprint("c", i), "broken"))
	}
	stdout, stderr, code := runRender(t, list(append(objects, broken, one, sound)...), "--check")
	for i := range 8 {
		for _, line := range []string{
			fmt.Sprintf("team-b/c%d: ConnectorClass \"broken\", configuration \"bad\": a line 2: {{ .connector.spec.typo }} "+
				"has no value\n", i),
			fmt.Sprintf("team-b/c%d: ConnectorClass \"broken\", configuration \"slow\", file \"a\": "+
				"rendering it takes more than ", i),
		} {
			if !strings.Contains(stdout, line) {
				t.Errorf("no %q in %q", line, stdout)
			}
		}
	}
	want := "connectors-csi: problems: 16; configurations that render: 10, that need configuration.params: 1\n"
	if strings.Count(stdout, "\n") != 16 || stderr != want || code != 1 {
		t.Errorf("exit code %d, %q, and on standard error %q", code, stdout, stderr)
	}

	for _, arguments := range [][]string{{"--configuration.names=config"}, {"--connector.name=one"}, {"--output-dir=x"}} {
		if stdout, stderr, code := runRender(t, list(one, sound), append(arguments, "--check")...); stdout != "" ||
			!strings.Contains(stderr, "--check takes all Connectors") || code != 1 {
			t.Errorf("exit code %d, %q, and on standard error %q", code, stdout, stderr)
		}
	}
}
