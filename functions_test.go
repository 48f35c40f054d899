package main

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/Masterminds/sprig/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// renderText renders a template with some values, of which .none, .null and .list's second are missing.
func renderText(t testing.TB, text string, change ...func(object)) (string, error) {
	t.Helper()
	spec := object{"number": 8443, "float": 1.5, "million": json.RawMessage("1000000.0"), "huge": 1e21,
		"tiny": 0.0000001, "numbers": json.RawMessage("[1,2.5,1e6]"), "yes": true, "no": false, "zero": 0, "text": "text",
		"empty": "",
		"null":  nil, "list": []any{"a", nil}, "deep": object{"list": []any{object{"a": 1, "b": []any{nil}}}},
		"map": object{"key": "value"}}
	o := connector("default", "git", "git", append([]func(object){with(spec, "spec")}, change...)...)
	decoded, err := decodeJSON(marshal(t, o))
	must(t, err)
	text = "{{ with .connector.spec }}" + text + `{{ end }}{{ define "t" }}{{ end }}`
	mounted := []mountedConnector{{decoded.(object), class("class", configuration("config", "file", text))}}
	token := issue("default", "default", nil, time.Hour, apiAudience)
	files, err := render(mounted, selection{Configurations: []string{"config"}}, token, func(string) {})
	if err != nil && strings.Contains(err.Error(), checkFunction) {
		t.Errorf("%s\n\tnot in plain words: %v", text, err)
	}
	return string(files["file"]), err
}

func marshal(t testing.TB, o object) []byte {
	text, err := json.Marshal(o)
	must(t, err)
	return text
}

// builtinFunctions are the functions of text/template, which only its source names.
func builtinFunctions(t *testing.T) []string {
	root, err := runCommand(exec.Command("go", "env", "GOROOT"))
	must(t, err)
	source := filepath.Join(strings.TrimSpace(root), "src/text/template/funcs.go")
	file, err := parser.ParseFile(token.NewFileSet(), source, nil, 0)
	must(t, err)
	var found []string
	ast.Inspect(file, func(node ast.Node) bool {
		if f, ok := node.(*ast.FuncDecl); ok && f.Name.Name == "builtins" {
			ast.Inspect(f, func(node ast.Node) bool {
				if pair, ok := node.(*ast.KeyValueExpr); ok {
					name, err := strconv.Unquote(pair.Key.(*ast.BasicLit).Value)
					must(t, err)
					found = append(found, name)
				}
				return true
			})
		}
		return true
	})
	if len(found) < 19 {
		t.Fatalf("only %v", found)
	}
	return found
}

// unguarded are the functions of text/template that are its own here too.
var unguarded = []string{"and", "call", "eq", "ge", "gt", "le", "len", "lt", "ne", "not", "or"}

// calls has for each function arguments that it takes. Those after a question mark may be missing.
var calls = map[string][]string{
	// text/template
	"and": {"?1", "?2"}, "call": nil, "eq": {"?1", "?2"}, "ge": {"1", "2"}, "gt": {"1", "2"}, "html": {`"a"`, "1"},
	"index": {"?.list", "0"}, "js": {`"a"`}, "le": {"1", "2"},
	"len": {".list"}, "lt": {"1", "2"}, "ne": {"?1", "?2"}, "not": {"?1"}, "or": {"?1", "?2"},
	"print": {`"a"`, "1"}, "printf": {`"%v%s"`, "1", `"a"`}, "println": {`"a"`, "1"},
	"urlquery": {`"a"`},

	// ask, or hold what is missing
	"all": {"?1", "?2"}, "any": {"?1", "?2"}, "coalesce": {"?1", "?2"}, "deepEqual": {"?1", "?2"},
	"default": {"?1", "?2"}, "dict": {`"a"`, "?1", `"b"`, "?2"},
	"dig": {`"a"`, "?1", "?.map"}, "empty": {"?1"}, "get": {"?.map", `"key"`}, "has": {"?1", "?.list"},
	"hasKey": {"?.map", `"key"`}, "kindIs": {`"int"`, "?1"}, "kindOf": {"?1"},
	"list": {"?1", "?2"}, "mustHas": {"?1", "?.list"}, "pluck": {`"key"`, "?.map", "?.map"},
	"ternary": {"?1", "?2", "true"}, "tuple": {"?1", "?2"}, "typeIs": {`"int"`, "?1"},
	"typeIsLike": {`"int"`, "?1"}, "typeOf": {"?1"},
	"append": {".list", "?1"}, "mustAppend": {".list", "?1"}, "push": {".list", "?1"}, "mustPush": {".list", "?1"},
	"prepend": {".list", "?1"}, "mustPrepend": {".list", "?1"},
	"without": {".list", "?1", "?2"}, "mustWithout": {".list", "?1", "?2"}, "set": {".map", `"key"`, "?1"},
	"compact": {".list"}, "mustCompact": {".list"},

	// print
	"cat": {`"a"`, "1"}, "join": {`","`, ".numbers"}, "quote": {`"a"`, "1"}, "squote": {`"a"`, "1"},
	"sortAlpha": {".numbers"}, "toStrings": {".numbers"}, "toString": {"1"},
	"toJson": {".map"}, "toPrettyJson": {".map"}, "toRawJson": {".map"}, "mustToJson": {".map"},
	"mustToPrettyJson": {".map"}, "mustToRawJson": {".map"},
	"urlJoin": {`(dict "host" "a")`},

	// numbers
	"add": {"1", ".number", `"3"`, "2.0"}, "add1": {".number"}, "sub": {"1", ".number"},
	"mul": {"1", ".number", "3"}, "div": {".number", "1"}, "mod": {".number", "2"},
	"max": {"1", "2", ".number"}, "min": {"1", "2", ".number"}, "biggest": {"1", "2"}, "int": {`"0x10"`},
	"int64": {".float"}, "float64": {`"1.5"`}, "atoi": {`"12"`},
	"add1f": {".float"}, "addf": {"1", ".float"}, "subf": {"1", ".float"}, "mulf": {"1", ".float"},
	"divf": {"1", ".float"}, "ceil": {".float"}, "floor": {".float"},
	"maxf": {"1", ".float"}, "minf": {"1", ".float"}, "round": {".float", "0", "0.5"}, "toDecimal": {`"777"`},
	"seq": {"1", "2", "3"}, "until": {"3"}, "untilStep": {"1", "2", "1"},
	"randInt": {"1", "2"},

	// time
	"ago": {"now"}, "date": {`"2006"`, "now"}, "dateInZone": {`"2006"`, "1", `"UTC"`},
	"date_in_zone": {`"2006"`, "now", `"UTC"`}, "dateModify": {`"1h"`, "now"},
	"date_modify": {`"1h"`, "now"}, "mustDateModify": {`"1h"`, "now"}, "must_date_modify": {`"1h"`, "now"},
	"duration": {`"95"`}, "durationRound": {`"95s"`}, "htmlDate": {"now"},
	"htmlDateInZone": {"now", `"UTC"`}, "now": {}, "toDate": {`"2006"`, `"2026"`},
	"mustToDate": {`"2006"`, `"2026"`}, "unixEpoch": {"now"},

	// texts
	"abbrev": {"8", `"hello world"`}, "abbrevboth": {"5", "10", `"1234 5678 9123"`}, "adler32sum": {`"a"`},
	"b32dec": {`"ME======"`}, "b32enc": {`"a"`}, "b64dec": {`"YQ=="`},
	"b64enc": {`"a"`}, "base": {`"a/b"`}, "camelcase": {`"a_b"`}, "clean": {`"a/b"`}, "contains": {`"a"`, `"b"`},
	"dir": {`"a/b"`}, "ext": {`"a.b"`}, "hasPrefix": {`"a"`, `"b"`},
	"hasSuffix": {`"a"`, `"b"`}, "hello": {}, "indent": {"1", `"a"`}, "initials": {`"a b"`}, "isAbs": {`"a"`},
	"kebabcase": {`"aB"`}, "lower": {`"A"`}, "nindent": {"1", `"a"`},
	"nospace": {`"a b"`}, "osBase": {`"a/b"`}, "osClean": {`"a/b"`}, "osDir": {`"a/b"`}, "osExt": {`"a.b"`},
	"osIsAbs": {`"a"`}, "plural": {`"a"`, `"b"`, "1"}, "repeat": {"2", `"a"`},
	"replace": {`"a"`, `"b"`, `"c"`}, "sha1sum": {`"a"`}, "sha256sum": {`"a"`}, "sha512sum": {`"a"`},
	"shuffle": {`"a"`}, "snakecase": {`"aB"`}, "split": {`","`, `"a,b"`},
	"splitList": {`","`, `"a,b"`}, "splitn": {`","`, "1", `"a,b"`}, "substr": {"0", "1", `"ab"`},
	"swapcase": {`"a"`}, "title": {`"a"`}, "trim": {`"a"`}, "trimAll": {`"a"`, `"b"`},
	"trimPrefix": {`"a"`, `"b"`}, "trimSuffix": {`"a"`, `"b"`}, "trimall": {`"a"`, `"b"`}, "trunc": {"1", `"ab"`},
	"untitle": {`"A"`}, "upper": {`"a"`}, "wrap": {"3", `"a b c"`},
	"wrapWith": {"3", `"-"`, `"a b c"`}, "fail": nil, "uuidv4": {}, "semver": {`"1.2.3"`},
	"semverCompare": {`"1.2.3"`, `"1.2.3"`}, "urlParse": {`"http://a"`}, "fromJson": {`"[1]"`},
	"mustFromJson": {`"[1]"`}, "randAlpha": {"1"}, "randAlphaNum": {"1"}, "randAscii": {"1"}, "randNumeric": {"1"},
	"randBytes":  {"1"},
	"regexMatch": {`"a"`, `"b"`}, "mustRegexMatch": {`"a"`, `"b"`}, "regexFind": {`"a"`, `"b"`},
	"mustRegexFind": {`"a"`, `"b"`}, "regexFindAll": {`"a"`, `"b"`, "-1"},
	"mustRegexFindAll": {`"a"`, `"b"`, "-1"}, "regexReplaceAll": {`"a"`, `"b"`, `"c"`},
	"mustRegexReplaceAll": {`"a"`, `"b"`, `"c"`}, "regexReplaceAllLiteral": {`"a"`, `"b"`, `"c"`},
	"mustRegexReplaceAllLiteral": {`"a"`, `"b"`, `"c"`}, "regexSplit": {`"a"`, `"b"`, "-1"},
	"mustRegexSplit": {`"a"`, `"b"`, "-1"}, "regexQuoteMeta": {`"a"`},

	// lists and maps
	"chunk": {"1", ".list"}, "mustChunk": {"1", ".list"}, "concat": {".list", ".list"}, "deepCopy": {".list"},
	"mustDeepCopy": {".map"}, "first": {".list"}, "mustFirst": {".list"},
	"initial": {".list"}, "mustInitial": {".list"}, "last": {".list"}, "mustLast": {".list"}, "rest": {".list"},
	"mustRest": {".list"}, "reverse": {".list"}, "mustReverse": {".list"},
	"uniq": {".list"}, "mustUniq": {".list"}, "slice": {".list", "0", "1"}, "mustSlice": {".list", "0", "1"},
	"keys": {".map", ".map"}, "values": {".map"}, "pick": {".map", `"key"`},
	"omit": {".map", `"key"`}, "unset": {".map", `"key"`}, "merge": {".map", ".map"}, "mustMerge": {".map", ".map"},
	"mergeOverwrite":     {".map", ".map"},
	"mustMergeOverwrite": {".map", ".map"},

	// secrets
	"bcrypt": {`"a"`}, "htpasswd": {`"a"`, `"b"`}, "derivePassword": {"1", `"long"`, `"a"`, `"b"`, `"c"`},
	"genPrivateKey": {`"ed25519"`}, "encryptAES": {`"a"`, `"b"`},
	"decryptAES": {`"a"`, `(encryptAES "a" "b")`}, "genCA": {`"a"`, "1"},
	"genCAWithKey":             {`"a"`, "1", `(genPrivateKey "ed25519")`},
	"genSelfSignedCert":        {`"a"`, "?(list)", "?(list)", "1"},
	"genSelfSignedCertWithKey": {`"a"`, "?(list)", "?(list)", "1", `(genPrivateKey "ed25519")`},
	"genSignedCert":            {`"a"`, "?(list)", "?(list)", "1", "$ca"},
	"genSignedCertWithKey":     {`"a"`, "?(list)", "?(list)", "1", "$ca", `(genPrivateKey "ed25519")`},
	"buildCustomCert":          {"(b64enc $ca.Cert)", "(b64enc $ca.Key)"},
}

// The table of functions holds every one of sprig and of text/template, once, but those that must not be called.
func TestTableOfFunctionsIsComplete(t *testing.T) {
	t.Parallel()
	want := slices.Collect(maps.Keys(sprig.TxtFuncMap()))
	want = append(want, builtinFunctions(t)...)
	forbidden := []string{"env", "expandenv", "getHostByName"}
	want = slices.DeleteFunc(want, func(name string) bool { return slices.Contains(forbidden, name) })
	slices.Sort(want)
	want = slices.Compact(want) // slice is sprig's
	got := slices.AppendSeq(slices.Clone(unguarded), maps.Keys(functions))
	if slices.Sort(got); !slices.Equal(got, want) {
		t.Errorf("the table holds %v\nand not %v", got, want)
	}
	if tested := slices.Sorted(maps.Keys(calls)); !slices.Equal(tested, want) {
		t.Errorf("tested are %v\nand not %v", tested, want)
	}
}

// Each argument of each function is missing in each way.
func TestEachArgumentMissing(t *testing.T) {
	t.Parallel()
	ways := []string{".none", ".none.of.this", ".null", "(index .list 1)", "(first (list))", `(get .map "none")`,
		`(dict "a" .none).a`, "$missing"}
	for name, arguments := range sorted(calls) {
		call := func(name string, arguments []string) string {
			text := "{{ $_ := " + name + " " + strings.ReplaceAll(strings.Join(arguments, " "), "?", "") + " }}done"
			if strings.Contains(text, "$ca") {
				text = `{{ $ca := genCA "a" 1 }}` + text
			}
			return "{{ $missing := .none }}" + text
		}
		if arguments == nil {
			continue // fail and call, which always fail
		}
		if got, err := renderText(t, call(name, arguments)); got != "done" {
			t.Errorf("%s of %v: %q, %v", name, arguments, got, err)
		}
		for i, argument := range arguments {
			for _, way := range ways {
				if strings.Contains(strings.Join(arguments, ""), "$ca") && way != ".none" {
					continue // which takes long
				}
				changed := slices.Clone(arguments)
				changed[i] = way
				texts := []string{call(name, changed)}
				if i == len(arguments)-1 { // and piped
					texts = append(texts, call(way+" | "+name, changed[:i]))
				}
				for _, text := range texts {
					got, err := renderText(t, text)
					if strings.HasPrefix(argument, "?") {
						if got != "done" {
							t.Errorf("%s\n\tis %q, %v", text, got, err)
						}
						continue
					}
					want := fmt.Sprintf("}}: argument %d of %s has no value", i+1, name)
					switch {
					case slices.Contains(unguarded, name):
						want = "file line 1: {{ " // and what text/template says
					case name == "dict" || name == "dig" || name == "index":
						want = "a key has no value"
					}
					if got != "" || err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), way) {
						t.Errorf("%s\n\tis %q and says %v, not %q", text, got, err, want)
					}
				}
			}
		}
	}
}

// Whatever prints refuses a value that is missing at any depth, and says where.
func TestMissingAtAnyDepth(t *testing.T) {
	t.Parallel()
	for _, value := range []string{`(list "a" .none)`, `.list`, `.deep`, `(dict "a" (list (dict "b" .none)))`,
		`(list (dict "a" .null))`, `(fromJson "[1,{\"a\":null}]")`, `(chunk 1 .list)`, `(prepend .list "b")`,
		`(append (list 1) .none)`, `(set (dict) "a" .none)`, `(dict "a" nil)`, `(values (dict "a" .none))`,
		`(merge (dict) (dict "a" (list .none)))`, `(deepCopy .list)`, `(concat .list .list)`, `(reverse .list)`,
		`(uniq .list)`,
		`(without .list "a")`, `(pick (dict "a" .none) "a")`, `(initial (list .none 1))`} {
		for _, printer := range []string{"", "print", "println 1", `printf "%v"`, `printf "%s %v" "a"`, "html", "js",
			"urlquery",
			"quote", "squote 1", "cat 1", `join ","`, "toJson", "toPrettyJson", "toRawJson", "mustToJson", "mustToPrettyJson",
			"mustToRawJson", "toString", "toStrings", "sortAlpha"} {
			for _, form := range []string{"{{ PRINT VALUE }}", "{{ $x := VALUE }}{{ PRINT $x }}", "{{ VALUE | PRINT }}",
				"{{ $_ := PRINT VALUE }}"} {
				if printer == "" && strings.ContainsAny(form, "|_") {
					continue
				}
				text := strings.NewReplacer("PRINT", printer, "VALUE", value).Replace(form)
				if got, err := renderText(t, text); err == nil || !strings.Contains(err.Error(), "has no value at [") {
					t.Errorf("%s\n\tis %q and says %v", text, got, err)
				}
			}
		}
	}
	for text, where := range map[string]string{
		`{{ .deep }}`: `file line 1: {{ .deep }} has no value at ["list"][0]["b"][0]`,
		`{{ .deep.list | toJson | indent 2 }}`: `file line 1: {{ .deep.list | toJson | indent 2 }}: argument 1 of toJson ` +
			`has no value at [0]["b"][0]`,
		`{{ list "a" .none | join "," }}`: `file line 1: {{ list "a" .none | join "," }}: argument 2 of join has no ` +
			`value at [1]`,
		`{{ urlJoin (dict "host" .none) }}`: `file line 1: {{ urlJoin (dict "host" .none) }}: argument 1 of urlJoin has ` +
			`no value at ["host"]`,
	} {
		if _, err := renderText(t, text); err == nil || !strings.HasSuffix(err.Error(), where) {
			t.Errorf("%s\n\tsays %v", text, err)
		}
	}
	// What is empty is there.
	for text, want := range sorted(map[string]string{
		`{{ .empty }}|{{ .no }}|{{ .zero }}`:                            "|false|0",
		`{{ quote .empty }}{{ toJson (list .empty .no .zero) }}`:        `""["",false,0]`,
		`{{ list | toJson }} {{ dict | toJson }} {{ list }} {{ dict }}`: "[] {} [] map[]",
		`{{ rest (list) | toJson }}{{ initial (list) | join "," }}{{ concat (list) (list) | toJson }}{{ ` +
			`slice (list) 0 | toJson }}`: "[][][]",
		`{{ regexFindAll "x" "y" -1 | len }}{{ regexFindAll "x" "y" -1 | toJson }}`: "0[]",
		`{{ first (list) | default "x" }}{{ index .none "a" 1 | default "y" }}{{ get .map "none" | default ` +
			`"z" }}`: "xyz",
		`{{ dig "a" "b" "c" .none }}{{ dig "key" "d" .map }}{{ dig "list" 0 "b" 0 "e" .deep }}`:     "cvaluee",
		`{{ compact .list | join "," }} {{ without .list .none | join "," }} {{ has .none .list }}`: "a a true",
		`{{ coalesce .none .null .list }}`: "",
	}) {
		if got, err := renderText(t, text); got != want && want != "" || want == "" && err == nil {
			t.Errorf("%s\n\tis %q, not %q: %v", text, got, want, err)
		}
	}
	// A nil that stands in the template is a missing value too.
	for text, want := range sorted(map[string]string{
		`{{ eq .none nil }} {{ default nil "a" }} {{ ternary "a" nil true }} {{ list nil | len }}`: "true a a 1",
		`{{ $c := genSelfSignedCert "a" nil nil 1 }}{{ trunc 10 $c.Cert }}`:                        "-----BEGIN",
	}) {
		if got, err := renderText(t, text); got != want {
			t.Errorf("%s\n\tis %q, not %q: %v", text, got, want, err)
		}
	}
	for _, f := range []string{"print", "println", `printf "%v"`, "html", "js", "urlquery", "toString", "int", "add 1",
		`date "2006"`, "toJson", "quote", `cat "a"`, "upper"} {
		got, err := renderText(t, "{{ "+f+" nil }}")
		if err == nil || !strings.Contains(err.Error(), " has no value") {
			t.Errorf("%s of nil is %q and says %v", f, got, err)
		}
	}
}

// What a function can make nothing of fails, with what the function is and why.
func TestNonsenseFails(t *testing.T) {
	t.Parallel()
	for text, word := range sorted(map[string]string{
		// printf
		`printf "%s" .number`: "%!s(int64=8443)", `printf "%d" .text`: "%!d(string=text)",
		`printf "%s"`: "%!s(MISSING)", `printf "%s" "a" "b"`: "%!(EXTRA string=b)",
		`printf "a" 1`:  "%!(EXTRA int=1)",
		`printf "%k" 1`: "%!k(int=1)", `printf "%"`: "%!(NOVERB)", `printf "%[3]d" 1`: "%!d(BADINDEX)",
		`printf "%d" 1.5`: "%!d(float64=1.5)", `printf "%s" .float`: "%!s(float64=1.5)",
		`printf "%*d" "a" 1`: "%!(BADWIDTH)", `printf "%.*f" "a" 1.5`: "%!(BADPREC)",
		`printf "%d" (list 1 "a")`: "%!d(string=a)", `printf "%s%s" "%!s(MISSING)"`: "%!s(MISSING)",
		`printf "100%% %d" "%!"`: "%!d(string=%!)", `printf "%!" 1`: "%!!(", `"a" | printf "%d"`: "%!d(string=a)",
		`printf "%t" 1`: "%!t(int=1)",

		// numbers
		`int "80a"`: `argument 1 of int is "80a", not a whole number`, `int "3.9"`: `is "3.9", not`, `int ""`: `is "", not`,
		`int "9223372036854775808"`: "not a whole number", `int .huge`: `is "1e+21", not`,
		`int .map`:  `is "map[key:value]", not a whole`,
		`int64 "x"`: `is "x", not`, `"80a" | int`: `is "80a", not`,
		`float64 "x"`:   `argument 1 of float64 is "x", not a number`,
		`float64 "NaN"`: ", not a number", `float64 "inf"`: ", not a number", `atoi "x"`: `"x"`,
		`atoi "1.0"`: `"1.0"`, `add "x" 1`: `is "x", not`, `add 1 "x"`: `is "x", not`, `"x" | add 1`: `is "x", not`,
		`add 1.5 1`: `is "1.5", not a whole number`, `add .list 1`: `is "[a <nil>]", not a whole`,
		`add1 "x"`: `is "x", not`, `sub "x" 1`: "sub", `sub 1 "x"`: "sub", `mul 1 2 "x"`: "mul", `div 1 "x"`: "div",
		`mod 1 "x"`: "mod", `div 1 0`: "divide by zero", `mod 1 0`: "divide by zero",
		`max 1 "x"`: "max", `min "x"`: "min", `biggest "x" 1`: "biggest", `addf "x"`: "addf", `add1f "x"`: "add1f",
		`subf 1 "x"`: "subf", `mulf "x" 1`: "mulf", `divf 1 "x"`: "divf", `divf 1 0`: "division by 0",
		`maxf 1 "x"`: "maxf", `minf 1 "x"`: "minf", `ceil "x"`: "ceil", `floor "x"`: "floor",
		`round "x" 1`: `is "x", not`, `round 1.5 400`: ", not a number", `mulf 1e300 1e300`: ", not a number",
		`toDecimal "9"`: `"9": invalid syntax`, `toDecimal "x"`: `"x"`, `seq`: "the result is empty",
		`seq 1 2 3 4`: "the result is empty", `seq 1 0 3`: "the result is empty", `randInt 2 1`: "invalid argument",
		`slice .list "x"`:   "is string, not int",
		`slice .list 0 1 2`: "two bounds at most", `dict "a"`: "a key has no value",
		`add 9223372036854775807 1`: "beyond 64 bits", `add1 9223372036854775807`: "beyond 64 bits",
		`mul 9223372036854775807 2`: "beyond 64 bits", `sub -9223372036854775807 2`: "beyond 64 bits",
		`slice .list 0 9`: "slice", `index .list 9`: "out of range", `index .list "a"`: "on string Value",
		`index .map 1`: "not assignable to type string", `index .number 1`: "on int64 Value",
		`dig "key" "x" "y" .map`: "on string Value", `dig "a" .map`: "dig needs",

		// time
		`date "2006" "x"`: `argument 2 of date is "x", not a date`, `date "2006" "2026-01-01"`: ", not a date",
		`date "2006" ""`: ", not a date", `date "2006" .map`: ", not a date", `ago "x"`: `is "x", not`,
		`htmlDate "x"`:    `is "x", not`,
		`date "2006" 1.5`: ", not a date", `dateInZone "2006" "x" "UTC"`: `is "x", not`,
		`dateInZone "2006" now "Nowhere"`: "unknown time zone Nowhere", `htmlDateInZone now "Nowhere"`: "Nowhere",
		`date_in_zone "2006" now "Nowhere"`: "Nowhere", `htmlDateInZone "x" "UTC"`: `"x"`,
		`dateModify "x" now`: "invalid duration", `date_modify "x" now`: "invalid duration",
		`toDate "2006" "x"`: "cannot parse",
		`duration "x"`:      `is "x", not`, `duration 1.5`: "1.5", `duration 9223372037`: "invalid duration",
		`durationRound "x"`: `invalid duration "x"`, `durationRound .map`: ", not a date",
		`unixEpoch "x"`: "time.Time",

		// texts
		`b64dec "not base64"`: "illegal base64", `b64dec "YQ"`: "illegal base64", `b32dec "1"`: "illegal base32",
		`fromJson "x"`: "invalid character", `fromJson ""`: "EOF", `fromJson "1 2"`: "more than one",
		`fromJson "[18446744073709551615]"`: "18446744073709551615 does not fit into 64 bits: write it as a string at [0]",
		`fromJson "1e400"`:                  "1e400 does not fit",
		`regexMatch "(" "a"`:                "missing closing )", `regexFind "(" "a"`: "missing closing )",
		`regexFindAll "(" "a" -1`: "missing closing )", `regexReplaceAll "(" "a" "b"`: "missing closing )",
		`regexReplaceAllLiteral "(" "a" "b"`: "missing closing )", `regexSplit "(" "a" -1`: "missing closing )",
		`semver "x"`: "nvalid", `semverCompare ">>" "1"`: "improper constraint",
		`urlParse "http://[::1"`: "unable to parse url",
		`urlParse "%zz"`:         "unable to parse url", `urlJoin (dict "host" 1)`: "must be of type string",
		`repeat -1 "a"`: "negative", `indent -1 "a"`: "negative", `substr 3 9 "a"`: "out of range",
		`randAlpha -1`: "the result is empty", `randAlphaNum -1`: "the result is empty",
		`randAscii -1`:   "the result is empty",
		`randNumeric -1`: "the result is empty", `randBytes -1`: "makeslice", `until 1.5`: "not int",

		// lists and maps
		`first "a"`: "string", `last 1`: "int", `rest .map`: "map", `initial "a"`: "string",
		`append "a" 1`: "string", `prepend .map 1`: "map", `reverse "a"`: "string", `uniq 1`: "int",
		`compact "a"`:   "string",
		`without "a" 1`: "string", `has 1 "a"`: "string", `slice "a" 0`: "string", `concat .list "a"`: "string",
		`chunk 1 "a"`: "string", `chunk 0 .list`: "below one", `chunk -1 .list`: "below one",
		`keys .list`:       "not map",
		`merge .map .list`: "not map",
		`merge (dict "a" 1) (dict "a" (dict "b" .none)) | toJson | len | eq 7 | not | fail`: "not string",
		`set .list "a" 1`: "not map", `len 1`: "len of type int", `lt 1 "a"`: "incompatible types",
		`gt .map 1`: "invalid type for comparison", `eq 1 "a"`: "incompatible types",

		// secrets
		`htpasswd "a:b" "c"`: "invalid username: a:b", `htpasswd "ci" (repeat 73 "x")`: "exceeds 72 bytes",
		`bcrypt (repeat 73 "x")`: "exceeds 72 bytes", `genPrivateKey "none"`: "Unknown type none",
		`derivePassword 1 "none" "a" "b" "c"`: "cannot find password template none",
		`decryptAES "a" "b"`:                  "illegal base64", `decryptAES "a" "YQ=="`: "out of range",
		`buildCustomCert "a" "b"`:                  "unable to decode",
		`genSignedCert "a" nil nil 1 (dict)`:       "not sprig.certificate",
		`genSelfSignedCert "a" (list "x") nil 1`:   "error parsing ip: x",
		`genSelfSignedCert "a" nil (list 1) 1`:     "is not a string",
		`genSelfSignedCert "a" (list .none) nil 1`: "is not a string", `genCAWithKey "a" 1 "x"`: "no PEM data",
	}) {
		for _, form := range []string{"{{ % }}", "{{ $_ := % }}", "{{ if % }}{{ end }}", "{{ default (%) 1 }}",
			"{{ range list (%) }}{{ end }}", `{{ template "t" (%) }}`} {
			isPrinted := form == "{{ % }}"
			form = strings.Replace(form, "%", text, 1)
			if !isPrinted && slices.Contains([]string{"round 1.5 400", "mulf 1e300 1e300"}, text) {
				continue // which fail where they are printed
			}
			got, err := renderText(t, form)
			if err == nil || !strings.Contains(err.Error(), word) || strings.Contains(err.Error(), "nil pointer") {
				t.Errorf("%s\n\tis %q and says %v, not %q", form, got, err, word)
			}
		}
	}
}

// Numbers are written as people write them, whatever prints them, and stay what they are.
func TestNumbersAndOtherValues(t *testing.T) {
	t.Parallel()
	for text, want := range sorted(map[string]string{
		`{{ .million }} {{ .huge }} {{ .tiny }} {{ .float }} ` +
			`{{ .numbers }} {{ 1000000.0 }} {{ 1e6 }}`: "1000000 1000000000000000000000 0.0000001 1.5 " +
			"[1 2.5 1000000] 1000000 1000000",
		`{{ print .million 1e6 "a" .million }} ` +
			`{{ printf "%v %s" .million "a" }} {{ printf "%v" .numbers }}`: "1000000 1000000a1000000 1000000 a [1 2.5 1000000]",
		`{{ html .million }} {{ js .million }} {{ urlquery .million }} {{ toString .million }} ` +
			`{{ println .million }}`: "1000000 1000000 1000000 1000000 1000000\n",
		`{{ quote .million }} {{ squote .million }} {{ cat .million 1 }} {{ join "," .numbers }} ` +
			`{{ toStrings .numbers }} {{ sortAlpha .numbers }}`: `"1000000" '1000000' 1000000 1 1,2.5,1000000 [1 2.5 1000000] ` +
			`[1 1000000 2.5]`,
		`{{ toJson .numbers }} {{ toRawJson .huge }} {{ toJson (dict "a" .tiny) }} {{ quote 1e6 }} ` +
			`{{ toJson 1e21 }}`: `[1,2.5,1000000] 1000000000000000000000 {"a":0.0000001} "1000000" 1000000000000000000000`,
		`{{ .million | quote }} {{ .huge | toJson }} {{ $x := .million }}{{ $x }} ` +
			`{{ dict "a" .million }} {{ chunk 2 .numbers }}`: `"1000000" 1000000000000000000000 1000000 map[a:1000000] [[1 ` +
			`2.5] [1000000]]`,
		`{{ printf "%f %.2f %e %g %5.1f|%6v|%-8v|%d" 1.5 .million .million .million .float .float .million ` +
			`.number }}`: "1.500000 1000000.00 1.000000e+06 1e+06   1.5|   1.5|1000000 |8443",
		`{{ printf "%q %x %c %U %t %g %#v %5d|%-5s|%05d %[1]v %%" ` +
			`"a" "a" 97 97 true 1.5 "a" 1 "b" 2 }}`: `"a" 61 a U+0061 true 1.5 "a"     1|b    |00002 a %`,
		`{{ printf "%s" "%!s(MISSING)" }} {{ printf "%v%%!" (list "%!d" "100%!") }} ` +
			`{{ printf "%s" (splitList "," "a%!,b") }}`: "%!s(MISSING) [%!d 100%!]%! [a%! b]",
		`{{ kindOf .number }} {{ kindOf .million }} {{ typeOf .numbers }} ` +
			`{{ kindOf (index .numbers 0) }} {{ kindOf (fromJson "1") }} {{ kindOf (int 1.5) }}`: "int64 float64 []interface " +
			"{} int64 float64 int",
		`{{ int .million }} {{ int "0x10" }} {{ int "8080.0" }} {{ int 3.9 }} {{ int -3.9 }} ` +
			`{{ int true }} {{ int64 "-5" }} {{ int .number }} {{ float64 "1e3" }}`: "1000000 16 8080 3 -3 1 -5 8443 1000",
		`{{ add 1 "2" 3.0 .number }} {{ add }} {{ add1 1 }} {{ sub 1 2 }} {{ mul 2 "3" 4 }} ` +
			`{{ div 7 2 }} {{ mod 7 2 }} {{ max 1 "5" 3 }} {{ min 4 2 }}`: "8449 0 2 -1 24 3 1 5 2",
		`{{ addf 0.1 "0.2" }} {{ divf 1 4 }} {{ mulf .million 1000 }} {{ ceil 1.1 }} {{ floor "2.9" }} ` +
			`{{ round 2.345 2 }} {{ maxf 1 2.5 }}`: "0.3 0.25 1000000000 2 2 2.35 2.5",
		`{{ atoi "12" }} {{ toDecimal 777 }} {{ toDecimal "0644" }} {{ seq 3 }} {{ seq 2 4 }} ` +
			`{{ seq 0 2 4 }} {{ until 3 }} {{ untilStep 0 4 2 }}`: "12 511 420 1 2 3 2 3 4 0 2 4 [0 1 2] [0 2]",
		`{{ index (fromJson "{\"a\":[1.5,{\"b\":true}]}") "a" 1 "b" }} {{ (fromJson "{\"a\":8080}").a }} ` +
			`{{ fromJson "[9007199254740993,1e21]" }} {{ toJson .huge | fromJson | kindOf }}`: "true 8080 [9007199254740993 " +
			"1000000000000000000000] float64",

		`{{ dateInZone "15:04 MST" 1767268800 "Europe/Berlin" }} ` +
			`{{ dateInZone "15:04" (toDate "2006-01-02" "2026-07-01") "America/New_York" }} ` +
			`{{ dateInZone "15:04" 0 "" }}`: "13:00 CET 20:00 00:00",
		`{{ htmlDateInZone 1767268800 "Asia/Tokyo" }} {{ date "2006-01-02" 0 }} ` +
			`{{ htmlDate 1767268800.0 }} ` +
			`{{ toDate "2006" "2026" | dateModify "24h" | date "2006-01-02" }}`: "2026-01-01 1970-01-01 2026-01-01 2026-01-02",
		`{{ duration 95 }} {{ duration "95" }} {{ duration .number }} {{ durationRound "2h10m" }} ` +
			`{{ durationRound 100000000000 }} {{ ago (now | dateModify "-60s") | trunc 2 }}`: "1m35s 1m35s 2h20m43s 2h 1m 1m",

		`{{ b64enc "a" | b64dec }} {{ b32enc "a" | b32dec }} {{ b64dec "" }} ` +
			`{{ htpasswd "a" "b" | trunc 6 }} {{ bcrypt "" | trunc 4 }} ` +
			`{{ derivePassword 1 "pin" "a" "b" "c" | len }}`: "a a  a:$2a$ $2a$ 4",
		`{{ genPrivateKey "ecdsa" | trunc 10 }} {{ htpasswd "" "b" | trunc 5 }} ` +
			`{{ encryptAES "a" "b" | decryptAES "a" }}`: "-----BEGIN :$2a$ b",
		`{{ index (split "," "a,b") "_1" }} {{ (split "," "a")._1 | default "x" }} {{ index "abc" 1 }} ` +
			`{{ index .list 0 }} {{ .list | first }} {{ index .map "key" | upper }}`: "b x 98 a a VALUE",
		`{{ and .yes "a" }} {{ or .none "b" }} {{ not .none }} {{ .yes | ternary "a" .none }} ` +
			`{{ if and .none (fail "x") }}{{ else }}lazy{{ end }} {{ or "a" (fail "x") }}`: "a b true a lazy a",
		`{{ typeOf .none }} {{ kindOf .none }} {{ kindIs "invalid" .none }} {{ deepEqual .none .null }} ` +
			`{{ hasKey .none "a" }} {{ pluck "a" .none .map | len }} {{ ne .none "a" }}`: "<nil> invalid true true false 0 true",
		`{{ with $x := .none | default "a" }}{{ $x }}{{ end }} {{ print (print "a" | upper) }} ` +
			`{{ ("a" | upper) | lower }} {{ (list "a" "b" | join ",") | quote }}`: `a A a "a,b"`,
	}) {
		if got, err := renderText(t, text); got != want {
			t.Errorf("%s\n\tis  %q\n\tnot %q: %v", text, got, want, err)
		}
	}
}

// The preview refuses what a node refuses, since what decides is as long as a token, and shows the word TOKEN.
func TestPreviewDecidesAsANode(t *testing.T) {
	t.Parallel()
	form := regexp.MustCompile(`^[-_A-Za-z0-9]+\.[-_A-Za-z0-9]+\.[-_A-Za-z0-9]*-[-_A-Za-z0-9]*_[-_A-Za-z0-9]*$`)
	if n := len(placeholderToken); !form.MatchString(placeholderToken) || n < 900 || n > 1500 {
		t.Errorf("this is no token: %s", placeholderToken)
	}
	n := startNode(t)
	git := connector("default", "git", "git")
	for text, want := range sorted(map[string]string{
		"{{ .context.token }}":            "TOKEN",
		"{{ .context.token | b64enc }}":   "VE9LRU4=",
		"{{ substr 0 5 .context.token }}": "TOKEN",
		// which TOKEN has not
		"{{ substr 100 105 .context.token }}":                                  placeholderToken[100:105],
		`{{ if lt (len .context.token) 100 }}{{ fail "too short" }}{{ end }}x`: "x",
	}) {
		c := gitClassOf("a", text)
		n.api.put(c, git)
		v := n.volume()
		v.mustPublish()
		v.mustUnpublish()
		stdout, stderr, code := runRender(t, []object{c, git}, "--configuration.names=config")
		if stdout != want || stderr != "" || code != 0 {
			t.Errorf("%s: exit code %d, %q, and on standard error %q", text, code, stdout, stderr)
		}
	}
	for text, word := range sorted(map[string]string{
		`{{ htpasswd "ci" .context.token }}`: `a line 1: {{ htpasswd "ci" .context.token }}: ci:failed to encrypt string ` +
			`with bcrypt: ` +
			`bcrypt: password length exceeds 72 bytes`,
		`{{ bcrypt .context.token }}`: "exceeds 72 bytes",
		`{{ if gt (len .context.token) 100 }}{{ fail (print "too long: " .context.token) }}{{ end }}`: "too long: TOKEN",
		`{{ index (dict "TOKEN" (dict "a" 1)) .context.token | toJson }}`: `{{ index (dict ` +
			`"TOKEN" (dict "a" 1)) .context.token | toJson }}: argument 1 of toJson has no value`,
		`{{ int .context.token }}`: `argument 1 of int is "TOKEN", not a whole number`,
	}) {
		c := gitClassOf("a", text)
		n.api.put(c, git)
		published := status.Convert(n.volume().publish()).Message()
		stdout, stderr, code := runRender(t, []object{c, git}, "--configuration.names=config")
		if stderr != "connectors-csi: "+published+"\n" || !strings.Contains(stderr, word) || stdout != "" || code != 1 {
			t.Errorf("%s: exit code %d, %q\nthe command: %sthe publish: %s", text, code, stdout, stderr, published)
		}
	}
}

// A whole number of the parameters that is beyond 64 bits is refused, since a template would get another one.
func TestNumbersOfParameters(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(gitClassOf("a", "{{ .configurations.a }} {{ toJson .configurations.a }}"))
	for value, want := range sorted(map[string]string{
		"1000000.0": "1000000 1000000", "1e6": "1000000 1000000",
		"9223372036854775807":  "9223372036854775807 9223372036854775807",
		"-9223372036854775808": "-9223372036854775808 -9223372036854775808",
		"0.1":                  "0.1 0.1", "1e-7": "0.0000001 0.0000001",
		"1.8446744073709552e19":  "18446744073709552000 18446744073709552000",
		`[1e21,{"b":2.0}]`:       `[1000000000000000000000 map[b:2]] [1000000000000000000000,{"b":2}]`,
		`"18446744073709551615"`: `18446744073709551615 "18446744073709551615"`,
	}) {
		v := n.volume(attrs{"configuration.params": `{"config":{"a":` + value + `}}`})
		v.mustPublish()
		v.want("a", want)
	}
	for _, value := range []string{"9223372036854775808", "-9223372036854775809", "18446744073709551615",
		"100000000000000000000", "1e400"} {
		n.volume(attrs{"configuration.params": `{"config":{"a":` + value + `}}`}).mustRefuse(codes.InvalidArgument,
			`configuration.params: `+value+` does not fit into 64 bits: write it as a string at ["a"]`)
		deep := n.volume(attrs{"configuration.params": `{"config":{"a":[1,{"b":` + value + `}]}}`})
		deep.mustRefuse(codes.InvalidArgument, `["a"][1]["b"]`)
	}
	// The API server has floats only beyond that.
	const big = "18446744073709552000"
	if got, err := renderText(t, "{{ $.connector.metadata.big }}",
		with(json.RawMessage(big), "metadata", "big")); got != big {
		t.Errorf("%q, %v", got, err)
	}
}

// The documented ConnectorClasses are as they were before functions were checked: testdata/documented.json has them,
// with the files of each configuration as commit a383bf0 made them of two Connectors, or what it said.
func TestDocumentedClassesAreAsBefore(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("testdata/documented.json")
	must(t, err)
	var documented []struct {
		Class json.RawMessage
		Files map[string]any // by configuration, which parameters may follow
	}
	must(t, json.Unmarshal(text, &documented))
	rendered, refused := 0, 0
	for _, d := range documented {
		value, err := decodeJSON(d.Class)
		must(t, err)
		class := value.(object)
		var mounted []mountedConnector
		for _, name := range []string{"default/one", "team-a/two"} {
			namespace, name, _ := strings.Cut(name, "/")
			o, err := decodeJSON(marshal(t, connector(namespace, name, nameOf(class),
				with("https://"+name+".example.com:8443/repository/x/", "spec", "address"),
				with([]any{object{"name": "sslVerify", "value": "false"}}, "spec", "params"),
				with("http://c-"+name+"."+namespace+".svc.cluster.local:8080", "status", "proxy", "httpAddress", "url"))))
			must(t, err)
			mounted = append(mounted, mountedConnector{o.(object), class})
		}
		for call, want := range sorted(d.Files) {
			configuration, params, given := strings.Cut(call, " ")
			made, err := render(mounted, selection{Configurations: []string{configuration},
				Params: map[string]json.RawMessage{configuration: json.RawMessage(params)}}, "TOKEN", func(string) {})
			got := map[string]any{}
			for name, content := range made {
				got[name] = string(content)
			}
			if said, ok := want.(string); ok {
				refused++
				if err == nil || !strings.HasSuffix(err.Error(), ": "+said) {
					t.Errorf("%s, %s: says %v, not %s", nameOf(class), call, err, said)
				}
				continue
			}
			if !given {
				rendered++
			}
			if err != nil || !reflect.DeepEqual(any(got), want) {
				t.Errorf("%s, %s: %v\n\t%v\nnot\t%v", nameOf(class), call, err, got, want)
			}
		}
	}
	if rendered != 19 || refused != 4 {
		t.Errorf("%d configurations are rendered, and %d lack parameters", rendered, refused)
	}
}
