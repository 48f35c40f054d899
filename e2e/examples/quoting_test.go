package examples

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// nasty are values that have broken files, and those that look like something else than text.
var nasty = []string{
	"plain",
	"",
	" spaces around ",
	"it's",
	`say "hi"`,
	`'quoted'`,
	`"quoted"`,
	`back\slash \n \t A \`,
	"$HOME ${HOME} $(id) `id`",
	"a;b|c&d>e<f",
	"# no comment ; no comment",
	"two\nlines",
	"\n[section]\nkey = injected\n",
	"tab\there",
	"carriage\r\nreturn\r",
	"null",
	"true",
	"0123",
	"~",
	"- item: {a: [1, 2]}, &anchor *alias !tag",
	"100% %20 %(home)s %% +",
	"<b>&amp;</b> ]]> <!-- -->",
	"*glob? [a-z]* !history",
	"grüße, 日本語, 🎉",
	"separators\u2028of\u2029lines",
	"zero\u200bwidth and \ufeffmark",
	"key=value [section] // comment",
	"{{ .template }} {{- end }}",
	`"""'''`,
	"--option @file /path/../x",
	"bell\aand escape\x1b[31m",
	"delete\x7f",
}

// reader reads files that have one value each.
type reader struct {
	format string // as it begins a row of the table
	file   string // with VALUE in the place of the value
	read   func(t *testing.T, paths []string) []reading
}

// reading is what is read of a file, or why nothing is.
type reading struct{ Value, Err string }

// python reads files by an expression in Python, in which f is the path of one.
func python(expression string) func(t *testing.T, paths []string) []reading {
	program := `import configparser, json, sys, tomllib, urllib.parse, yaml
def read(f):
	try:
		value = ` + expression + `
		return {"Value": value} if isinstance(value, str) else {"Err": "no text but " + repr(value)}
	except Exception as e:
		return {"Err": repr(e)}
json.dump([read(f) for f in sys.argv[1:]], sys.stdout)`
	return func(t *testing.T, paths []string) []reading {
		output, err := exec.Command("python3", append([]string{"-c", program}, paths...)...).Output()
		var readings []reading
		if err := errors.Join(err, json.Unmarshal(output, &readings)); err != nil {
			t.Fatal(err)
		}
		return readings
	}
}

// program reads files by a command, and cuts off what it adds at the end.
func program(addition string, args ...string) func(t *testing.T, paths []string) []reading {
	return func(t *testing.T, paths []string) (readings []reading) {
		for _, path := range paths {
			var all []string
			for _, arg := range args {
				all = append(all, strings.ReplaceAll(arg, "PATH", path))
			}
			output, err := exec.Command(all[0], all[1:]...).Output()
			readings = append(readings, readingOf(strings.TrimSuffix(string(output), addition), err))
		}
		return readings
	}
}

func readingOf(value string, err error) reading {
	if err != nil {
		return reading{Err: err.Error()}
	}
	return reading{Value: value}
}

func kubernetesYAML(t *testing.T, paths []string) (readings []reading) {
	for _, path := range paths {
		text, err := os.ReadFile(path)
		value := map[string]any{}
		err = errors.Join(err, yaml.UnmarshalStrict(text, &value))
		readings = append(readings, readingOf(fmt.Sprint(value["a"]), err))
	}
	return readings
}

// urlParts is the value that all parts of a URL have.
const urlParts = `(lambda u: (lambda parts: parts.pop() if len(parts) == 1 else parts)({
			*map(urllib.parse.unquote, [u.username, u.password, u.path[1:], u.fragment]),
			urllib.parse.parse_qs(u.query, keep_blank_values=True)["a"][0]}))(urllib.parse.urlsplit(open(f).read()))`

var readers = []reader{
	{"JSON", `{"a": VALUE}`, python(`json.load(open(f))["a"]`)},
	{"YAML", `a: VALUE`, python(`yaml.safe_load(open(f, "rb"))["a"]`)},
	{"YAML", `a: VALUE`, kubernetesYAML},
	{"TOML", `a = VALUE`, python(`tomllib.load(open(f, "rb"))["a"]`)},
	{"XML", `<a>VALUE</a>`, program("\n", "xmllint", "--xpath", "string(/a)", "PATH")},
	{"git", "[a]\n\tb = VALUE\n", program("\x00", "git", "config", "--file", "PATH", "--null", "--get", "a.b")},
	{"INI", "[a]\nb = VALUE\nc = d\n", python(`(lambda c: c.read(f, "utf-8") and c.get("a", "b"))(configparser.RawConfigParser())`)},
	{"a part of a URL", "https://VALUE:VALUE@host/VALUE?a=VALUE&b#VALUE", python(urlParts)},
	{"a shell", "a=VALUE\nb=c\n", program("", "sh", "-euc", `. "PATH"; printf %s "$a"`)},
	{"a shell", "a=VALUE\nb=c\n", program("", "bash", "-euc", `. "PATH"; printf %s "$a"`)},
}

// beyond are the values that a format cannot hold, as docs/templates.md says.
var beyond = map[string]*regexp.Regexp{
	"YAML": regexp.MustCompile(`\x7f`),
	"TOML": regexp.MustCompile(`\x7f`),
	"XML":  regexp.MustCompile(`[\x00-\x08\x0b\x0c\x0e-\x1f]`),
	"git":  regexp.MustCompile(`[\x00-\x08\x0b-\x1f\x{2028}\x{2029}]`),
	"INI":  regexp.MustCompile(`[\r\n]|^\s|\s$`),
}

// quoting returns the templates of docs/templates.md by format.
func quoting(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile("../../docs/templates.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## Quoting\n")
	section, _, _ = strings.Cut(section, "\n## ")
	found := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| ([^|`]+) \\| `([^`]+)`").FindAllStringSubmatch(section, -1) {
		for _, format := range strings.Split(row[1], ", ") {
			format, _, _ = strings.Cut(format, " as ")
			found[format] = strings.ReplaceAll(row[2], `\|`, "|")
		}
	}
	return found
}

// What docs/templates.md says of quoting gives every reader the value as it is. What a format cannot hold, its reader or the
// template refuses; nobody reads something else.
func TestQuotingAsDocumented(t *testing.T) {
	templates := quoting(t)
	var formats []string
	for _, r := range readers {
		formats = append(formats, r.format)
	}
	slices.Sort(formats)
	if have := slices.Sorted(maps.Keys(templates)); !slices.Equal(slices.Compact(formats), have) {
		t.Fatalf("docs/templates.md has the formats %q, not %q", have, formats)
	}
	for i, r := range readers {
		t.Run(fmt.Sprint(i, " ", r.format), func(t *testing.T) {
			t.Parallel()
			var together []string // in one rendering
			for _, value := range nasty {
				if r.format == "INI" && strings.ContainsAny(value, "\r\n") {
					if _, err := renderValues(t, r, templates[r.format], value); err == nil || !strings.Contains(err.Error(), "one line, please") {
						t.Errorf("%q is not refused: %v", value, err)
					}
				} else {
					together = append(together, value)
				}
			}
			dir, err := renderValues(t, r, templates[r.format], together...)
			if err != nil {
				t.Fatal(err)
			}
			kept := 0
			for i, got := range r.readAll(t, dir, len(together)) {
				value := together[i]
				switch exceptional := beyond[r.format] != nil && beyond[r.format].MatchString(value); {
				case got == reading{Value: value}:
					kept++
				case exceptional && (got.Err != "" || r.format == "INI" && got.Value == strings.TrimSpace(value)):
				default:
					t.Errorf("%q is read as %+v from\n%s", value, got, contents(t, dir)[fmt.Sprint(i)])
				}
			}
			if kept < 20 {
				t.Errorf("only %d values are kept", kept)
			}
		})
	}
}

// readAll reads the files of renderValues.
func (r reader) readAll(t *testing.T, dir string, number int) []reading {
	t.Helper()
	var paths []string
	for i := range number {
		paths = append(paths, fmt.Sprintf("%s/%d", dir, i))
	}
	readings := r.read(t, paths)
	if len(readings) != number {
		t.Fatalf("%d of %d files are read", len(readings), number)
	}
	return readings
}

// renderValues writes a file for each value into a directory; its name is the value's number.
func renderValues(t *testing.T, r reader, template string, values ...string) (string, error) {
	t.Helper()
	data, params := map[string]string{}, []map[string]string{}
	for i, value := range values {
		params = append(params, map[string]string{"name": "value", "value": value})
		data[fmt.Sprint(i)] = fmt.Sprintf("{{ with index .connector.spec.params %d }}%s{{ end }}", i,
			strings.ReplaceAll(r.file, "VALUE", template))
	}
	const group = "connectors.alauda.io/v1alpha1"
	class := map[string]any{"apiVersion": group, "kind": "ConnectorClass", "metadata": map[string]any{"name": "quoting"},
		"spec": map[string]any{"configurations": []any{map[string]any{"name": "config", "data": data}}}}
	connector := map[string]any{"apiVersion": group, "kind": "Connector", "metadata": map[string]any{"name": "quoting", "namespace": "default"},
		"spec": map[string]any{"connectorClassName": "quoting", "address": "https://example.com", "params": params}}
	return render(t, "config", "TOKEN", class, connector)
}

// Why docs/templates.md names these functions and no others: not every reader knows what those write.
func TestQuotingByOtherFunctions(t *testing.T) {
	for _, c := range []struct{ format, template, value string }{
		{"git", "{{ .value | toJson }}", "a&b"},
		{"git", "{{ .value | quote }}", "bell\a"},
		{"JSON", "{{ .value | quote }}", "bell\a"},
		{"TOML", "{{ .value | quote }}", "bell\a"},
		{"a part of a URL", "{{ .value | urlquery }}", "a b"},
		{"XML", "{{ .value | html }}", "carriage\r\nreturn"},
	} {
		i := slices.IndexFunc(readers, func(r reader) bool { return r.format == c.format })
		dir, err := renderValues(t, readers[i], c.template, c.value)
		if err != nil {
			t.Fatal(err)
		}
		if got := readers[i].readAll(t, dir, 1)[0]; got.Value == c.value {
			t.Errorf("%s reads %q from %s", c.format, c.value, c.template)
		}
	}
}
