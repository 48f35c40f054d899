package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// hostile is what somebody may write so that others get no Pods, and how it has to end.
type hostile struct {
	what     string
	template string // of the file "file"
	message  string // a regular expression; none: it does no harm
}

// What the driver says of the file that a renderer died of. It stops one after 5 s where the machine is busy.
const (
	takesMemory = `, file "file": rendering it takes more than 64 MiB of memory$`
	takesTime   = `, file "file": rendering it takes more than (2s of processor time|5s)$`
	takesEither = `, file "file": rendering it takes more than (64 MiB of memory|2s of processor time|5s)$`
	failsPlain  = `: file line 1`
)

const (
	// large is a string of twenty million characters.
	large = `{{ $large := repeat 20000000 "x" }}`
	// cyclic are a map and a list that contain themselves.
	cyclic = `{{ $map := dict "a" 1 }}{{ $list := list $map }}{{ $_ := set $map "self" $map }}{{ $_ = set $map "list" ` +
		`$list }}`
)

// hostileTemplates are templates by their kinds. What takes memory takes more than the 128 MiB that a renderer may come
// to have, if all at once.
func hostileTemplates() [][]hostile {
	definitions := ""
	for i := range 20000 {
		definitions += fmt.Sprintf(`{{define "%d"}}x{{end}}`, i)
	}
	return [][]hostile{
		{ // Values that are too large
			{"until", `{{ range until (int .configurations.count) }}x{{ end }}`, takesMemory},
			{"until below zero", `{{ until -1000000000 }}`, takesMemory},
			{"untilStep", `{{ untilStep 0 2000000000 2 }}`, takesMemory},
			{"untilStep by nothing", `{{ len (untilStep 0 1 0) }}`, ""},
			{"seq", `{{ seq 1 1 1000000000 }}`, takesMemory},
			{"repeat", `{{ repeat 1000000000 "x" }}`, takesMemory},
			{"repeat beyond all numbers", `{{ repeat 9223372036854775807 "xx" }}`, failsPlain + `.* output length overflow$`},
			{"indent", `{{ indent 1000000000 "x" }}`, takesMemory},
			{"nindent of many lines", `{{ repeat 10000 "\n" | nindent 100000 }}`, takesMemory},
			{"randBytes", `{{ randBytes 1000000000 }}`, takesMemory},
			{"randAlphaNum", `{{ randAlphaNum 1000000000 }}`, takesEither},
			{"shuffle", large + `{{ shuffle (print $large $large $large) }}`, takesEither},
			// fmt has a limit
			{"printf with a huge width", `{{ printf "%1000000000d" 1 }}`, failsPlain +
				`.*: the format "%1000000000d" does not fit its values: %!\(NOVERB\)`},
			{"printf with many widths", `{{ printf (repeat 1000 "%1000000[1]d") 1 }}`, takesMemory},
			{"printf with a width of the Pod's",
				`{{ range 1000 }}{{ $.configurations.count | int | printf "%[1]*[1]d" }}{{ end }}`, failsPlain +
					`.*%!\(BADWIDTH\)1000000000`},
			{"printf of one argument many times", `{{ printf (repeat 1000 "%[1]s") (repeat 1000000 "x") }}`, takesMemory},
			{"replace", `{{ replace "" (repeat 1000 "x") (repeat 1000000 "y") }}`, takesMemory},
			{"regexReplaceAll", `{{ regexReplaceAll "" (repeat 1000000 "x") (repeat 1000 "y") }}`, takesMemory},
			{"regexReplaceAll with repetitions", `{{ regexReplaceAll "(x{1,1000}){1,1000}" "x" "y" }}`, failsPlain +
				`.*invalid repeat count`},
			{"regexSplit", large + `{{ regexSplit "" $large -1 }}`, takesEither},
			{"mustRegexFindAll", large + `{{ mustRegexFindAll "" $large -1 }}`, takesEither},
			{"splitList", large + `{{ splitList "" $large }}`, takesMemory},
			{"split", large + `{{ split "x" $large }}`, takesEither},
			{"wrapWith", `{{ wrapWith 1 (repeat 1000 "x") (repeat 1000000 "y ") }}`, takesMemory},
			{"chunk", `{{ chunk 1 (until 3000000) }}`, takesEither},
			{"html", `{{ html (repeat 60000000 "<") }}`, takesMemory},
			{"toJson", `{{ toJson (repeat 60000000 "<") }}`, takesMemory},
			{"fromJson", `{{ $_ := fromJson (print "[" (repeat 3000000 "[],") "1]") }}`, takesEither},
			{"date", `{{ date (repeat 5000000 "Monday, 02 January 2006 15:04:05.000000000 ") now }}`, takesMemory},
			{"dateModify", `{{ now | dateModify "9223372036854775807h" | date "2006" | len }}`, failsPlain +
				`.*invalid duration`},
			{"trunc", `{{ trunc -9223372036854775808 "x" }}`, ""},
			{"slice", `{{ slice (list 1 2) 1 9223372036854775807 }}`, failsPlain + `.*slice`},
			{"semver", `{{ semver (repeat 100000 "1") }}`, failsPlain},
			{"division by zero", `{{ div 1 0 }}`, failsPlain + `.*divide by zero`},
			{"a failure of a hundred million words", `{{ fail (repeat 100000000 "x ") }}`, takesMemory},
			{"a failure of a million lines", `{{ fail (repeat 1000000 "x\n") }}`, failsPlain +
				`: {{ fail \(repeat 1000000 "x\\n"\) }}: (x\n)+x? …$`},
		},
		{ // Values that grow
			{"a list doubled", `{{ $l := list 1 }}{{ range 64 }}{{ $l = concat $l $l }}{{ end }}`, takesEither},
			{"a list appended", `{{ $l := list }}{{ range 100000000 }}{{ $l = append $l $l }}{{ end }}`, takesEither},
			{"a string doubled", `{{ $s := "x" }}{{ range 64 }}{{ $s = print $s $s }}{{ end }}`, takesMemory},
			{"cat and nindent", `{{ $s := "x" }}{{ range 64 }}{{ $s = cat $s $s | nindent 2 }}{{ end }}`, takesMemory},
			{"quote of quote", `{{ $s := "\"" }}{{ range 64 }}{{ $s = quote $s }}{{ end }}`, takesMemory},
			{"a map of many keys", `{{ $d := dict }}{{ range $i := 100000000 }}{{ $_ := set $d (toString $i) "" }}{{ end }}`,
				takesEither},
			{"deep JSON indented",
				`{{ $d := dict }}{{ range 9000 }}{{ $d = dict "k" $d }}{{ end }}{{ toPrettyJson $d | repeat 3 }}`, takesEither},
			{"a deep value copied", `{{ $d := dict }}{{ range 1000000 }}{{ $d = dict "k" $d }}{{ end }}{{ $_ := deepCopy $d }}`,
				takesEither},
			{"a shared value printed", `{{ $l := list "x" }}{{ range 40 }}{{ $l = list $l $l }}{{ end }}{{ toJson $l }}`,
				takesEither},
		},
		{ // Values that contain themselves
			{"a cycle printed", cyclic + `{{ $map }}`, takesEither},
			{"a cyclic list printed", cyclic + `{{ $list }}`, takesEither},
			{"a cycle in printf", cyclic + `{{ printf "%v" $map }}`, takesEither},
			{"a cycle in Go's syntax", cyclic + `{{ printf "%#v" $list }}`, takesEither},
			{"a cycle quoted", cyclic + `{{ quote $map }}`, takesEither},
			{"a cycle copied", cyclic + `{{ $_ := deepCopy $map }}`, takesEither},
			{"a cycle merged", cyclic + `{{ $_ := merge (dict "self" (dict)) $map $map }}`, takesEither},
			{"a cycle in JSON", cyclic + `{{ mustToJson $map }}`, takesEither},
			{"a cycle in JSON that returns no error", cyclic + `{{ toJson $map }}`, takesEither},
			{"a cycle joined", cyclic + `{{ join "," $list }}`, takesEither},
			{"a cycle for printf's marks", cyclic + `{{ printf "%d%v" "%!" $map }}`, takesEither},
			{"a cycle with a missing value", cyclic + `{{ $_ = set $map "none" .none }}{{ toJson $map }}`, `(` + takesEither +
				`|` + failsPlain + `.*has no value)`},
			{"a deep value printed", `{{ $d := dict }}{{ range 1000000 }}{{ $d = dict "k" $d }}{{ end }}{{ $d }}`, takesEither},
			{"a shared value of floats", `{{ $l := list 1.5 }}{{ range 40 }}{{ $l = list $l $l }}{{ end }}{{ print $l }}`,
				takesEither},
			{"a cycle in the data", `{{ $_ := set .connector.spec "up" . }}{{ . }}`, takesEither},
		},
		{ // Loops
			{"range over a number", `{{ range 9223372036854775807 }}{{ end }}`, takesTime},
			{"range that prints", `{{ range 9223372036854775807 }}x{{ end }}`, takesEither},
			{"calls that double",
				`{{ define "two" }}{{ if gt . 0 }}{{ template "two" (sub . 1) }}{{ template "two" (sub . 1) }}{{ end }}{{ end ` +
					`}}{{ template "two" 60 }}`, takesTime},
			{"a template that calls itself", `{{ template "file" . }}`, takesEither},
			{"a template that prints and calls itself", `{{ define "r" }}x{{ template "r" . }}{{ end }}{{ template "r" . }}`,
				takesEither},
			{"uniq", `{{ $_ := uniq (until 200000) }}`, takesTime},
			{"regexMatch", `{{ $s := repeat 100000 "x" }}{{ range 1000000 }}{{ $_ := regexMatch "(x+x+)+y" $s }}{{ end }}`,
				takesTime},
			{"sha512sum", `{{ $s := repeat 1000000 "x" }}{{ range 1000000 }}{{ $_ := sha512sum $s }}{{ end }}`, takesTime},
			{"derivePassword", `{{ range 1000 }}{{ $_ := derivePassword 1 "long" "password" "user" "example.com" }}{{ end }}`,
				takesEither},
			{"genPrivateKey", `{{ range 1000 }}{{ $_ := genPrivateKey "rsa" }}{{ end }}`, takesTime},
			{"htpasswd and bcrypt",
				`{{ range 1000 }}{{ $_ := htpasswd "user" "password" }}{{ $_ := bcrypt "password" }}{{ end }}`, takesTime},
		},
		{ // Texts that are too much
			{"parentheses", `{{ ` + strings.Repeat("(", 1<<20), failsPlain + `: max expression depth exceeded$`},
			{"if in if", strings.Repeat("{{if 1}}", 100000) + strings.Repeat("{{end}}", 100000), takesEither},
			{"else if", "{{if 0}}" + strings.Repeat("{{else if 0}}", 120000) + "{{end}}", takesEither},
			{"actions", strings.Repeat("{{1}}", 200000), takesEither},
			{"beginnings of actions", strings.Repeat("{{", 1<<19), failsPlain},
			{"fields", `{{ .connector` + strings.Repeat(".a", 500000) + ` }}`, failsPlain},
			{"pipes", `{{ "x"` + strings.Repeat("|html", 100000) + ` }}`, ""},
			{"definitions", definitions + `{{ template "19999" }}`, ""},
			{"NUL, and what is not UTF-8", "\x00\xff{{ len .connector.name }}", ""},
		},
	}
}

// Each of them is for a Pod of another namespace, since each has an account of processor time. Only long tests try more
// than one template of a kind with the same message.
func TestHostileTemplates(t *testing.T) {
	n := newNode(t)
	p := n.startBinary(rendererBinary(), "--refresh-interval=1ns")
	var chosen []hostile
	for _, kind := range hostileTemplates() {
		messages := map[string]bool{}
		for _, h := range kind {
			if longTests || !messages[h.message] {
				chosen = append(chosen, h)
			}
			messages[h.message] = true
		}
	}
	t.Run("set", func(t *testing.T) {
		for i, h := range chosen {
			t.Run(h.what, func(t *testing.T) {
				t.Parallel()
				name := fmt.Sprintf("hostile-%d", i)
				n.api.put(class(name, configuration("config", "file", h.template)), connector(name, "git", name))
				v := n.pod(name+"/default").volume("config", attrs{"configuration.params": `{"config":{"count":1000000000}}`})
				v.t = t
				if h.message == "" {
					v.mustPublish()
					v.mustUnpublish()
				} else {
					v.mustBeStopped(fmt.Sprintf(`^ConnectorClass %q, configuration "config"%s`, name, h.message))
				}
				next := n.pod("other/default").volume("config", attrs{"connector.namespace": "default"})
				next.t = t
				next.mustPublish()
				next.mustUnpublish()
			})
		}
	})
	p.wantSound(t)
}

// mustBeStopped publishes a volume that has to be refused for what it takes, with a message of this form.
func (v *podVolume) mustBeStopped(message string) {
	v.t.Helper()
	err := v.publish()
	for status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "the node is too busy") {
		err = v.publish() // as kubelet does
	}
	wantError(v.t, err, codes.FailedPrecondition)
	if text := status.Convert(err).Message(); !regexp.MustCompile(`(?s)` + message).MatchString(text) {
		v.t.Errorf("not %q, but %q", message, cut(text, 500))
	}
	v.wantNothing()
}

// wantSound makes sure that a driver has never had much memory, and leaves no process behind when it ends.
func (p *process) wantSound(t *testing.T) {
	t.Helper()
	if peak := kilobytes(t, p.Process.Pid, "VmHWM"); peak > 64<<10 {
		t.Errorf("the driver had %d KiB", peak)
	}
	left := children(t, p.Process.Pid)
	for pid, state := range left {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) // nothing if it is a zombie
		if !strings.HasPrefix(string(text), driverName+"\x00"+serveArgument+"\x00") {
			t.Errorf("process %d is left in state %s: %q", pid, state, text)
		}
	}
	if len(left) > maxRenderers {
		t.Errorf("%d renderers: %v", len(left), left)
	}
	must(t, p.Process.Signal(syscall.SIGTERM))
	p.awaitExit(t)
	if code := p.ProcessState.ExitCode(); code != 0 {
		t.Errorf("the driver ended with %d", code)
	}
	for pid := range left {
		awaitEnd(t, pid)
	}
}

// awaitEnd waits until a process has ended.
func awaitEnd(t testing.TB, pid int) {
	t.Helper()
	eventually(t, fmt.Sprintf("process %d has ended", pid), func() bool {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || bytes.Contains(text, []byte(") Z ")) // somebody else's, to wait for
	})
}

func TestHonestTemplatesThatAreSlow(t *testing.T) {
	n := startNode(t)
	for i, template := range []string{
		`{{ $key := genPrivateKey "rsa" }}{{ trunc 10 $key }}`, // 4096 bits
		`{{ $ca := genCA "ca" 365 }}{{ $ca.Cert }}`,
		`{{ $ca := genCA "ca" 365 }}{{ $cert := genSignedCert "a" nil (list "a.example.com") 365 $ca }}{{ $cert.Key }}`,
		`{{ derivePassword 1 "long" "password" "user" "example.com" }}`, // takes 32 MiB
		`{{ htpasswd "user" "password" }}{{ bcrypt "password" }}`,
		`{{ encryptAES "secretkey" "plaintext" | decryptAES "secretkey" }}`,
		`{{ range until 10000 }}{{ regexReplaceAll "([a-z]+)\\.([a-z]+)" "git.example" "${2}.${1}" }}{{ end }}`,
		`{{ range $i, $word := splitList " " (repeat 50000 "word ") }}{{ $i }}{{ end }}`,
		`{{ $d := dict }}{{ range $i := 10000 }}{{ $_ := set $d (toString $i) (list $i (dict "a" "b")) }}{{ end }}{{ ` +
			`toPrettyJson $d | fromJson | toPrettyJson }}`,
		`{{ repeat 1048576 "x" }}`,
	} {
		n.api.put(class("slow", configuration("config", "file", template)))
		namespace := fmt.Sprintf("slow-%d", i) // with an account of its own
		n.api.put(connector(namespace, "slow", "slow"))
		v := n.pod(namespace+"/default").volume("config", attrs{"connector.name": "slow"})
		err := v.publish()
		for err != nil && regexp.MustCompile("the node is too busy|takes more than 5s").MatchString(err.Error()) {
			err = v.publish()
		}
		if err != nil || v.file("file") == "" {
			t.Errorf("%s: %v", template, err)
		}
	}
}

// nested is a list in a list in a list, and so on.
func nested(depth int) json.RawMessage {
	return json.RawMessage(strings.Repeat("[", depth) + strings.Repeat("]", depth))
}

// manyLists has 1 MB and takes forty times as much while it is decoded.
var manyLists = with(json.RawMessage("["+strings.Repeat("[],", 350000)+"[]]"), "spec", "lists")

func TestHostileObjects(t *testing.T) {
	n := newNode(t)
	p := n.startBinary(rendererBinary(), "--refresh-interval=1ns")
	var files []string
	for i := range 10000 {
		files = append(files, fmt.Sprintf("file-%d", i), "x")
	}
	class := func(data ...string) object { return class("hostile", configuration("config", data...)) }
	for _, c := range []struct {
		what      string
		class     object
		connector func(object)
		params    string
		message   string // a regular expression; none: it does no harm
	}{
		{what: "10,000 files", class: class(files...),
			message: `^ConnectorClass "hostile", configuration "config": file "file-\d+": a volume may hold 1024 KiB in 256 ` +
				`files$`},
		{what: "a huge file name", class: class(strings.Repeat("x", 1<<20), "x"),
			message: `^ConnectorClass "hostile", configuration "config": file name "x+ …$`},
		{what: "a large class", class: func() object { c := class("file", "x"); manyLists(c); return c }()},
		{what: "a deep Connector", class: class("file", "x"), connector: with(nested(9000), "spec", "deep")},
		{what: "a deep Connector printed", class: class("file", "{{ toPrettyJson .connector }}"),
			connector: with(nested(9000), "spec", "deep"), message: takesEither},
		{what: "a large Connector", class: class("file", "x"), connector: manyLists},
		{what: "a larger Connector", class: class("file", "x"),
			connector: with(json.RawMessage("["+strings.Repeat("{},", 1000000)+"{}]"), "spec", "lists"),
			message:   `^Connector "hostile-\d+/git": decoding it takes more than 64 MiB of memory$|` + takesEither},
		{what: "deep parameters", class: class("file", "{{ toPrettyJson .configurations.deep }}"), params: `{"deep":` +
			string(nested(9000)) + `}`, message: takesEither},
	} {
		t.Run(c.what, func(t *testing.T) {
			namespace := fmt.Sprintf("hostile-%d", serial.Add(1))
			o := connector(namespace, "git", "hostile")
			if c.connector != nil {
				c.connector(o)
			}
			n.api.put(c.class, o)
			v := n.pod(namespace+"/default").volume("config",
				attrs{"configuration.params": `{"config":` + cmp.Or(c.params, "{}") + `}`})
			v.t = t
			if c.message == "" {
				v.mustPublish()
			} else {
				v.mustBeStopped(c.message)
			}
		})
	}

	// The API server takes no deeper objects, and so does the driver.
	n.api.set(func() {
		n.api.objects[connectorPath("default", "git")] = []byte(`{"metadata":{"name":"git"},"spec":` + string(nested(20000)) +
			"}")
	})
	n.volume().mustRefuse(codes.Unavailable,
		`Connector "default/git" cannot be read: the answer is not a Kubernetes object`)

	// Sixteen at once, and then somebody else.
	n.api.put(class("file", "x"), connector("crowd", "git", "hostile", manyLists))
	errs := make(chan error)
	for i := range 16 {
		v := n.pod(fmt.Sprintf("crowd/default-%d", i)).volume("config")
		go func() { errs <- v.publish() }()
	}
	passed := 0
	for range 16 {
		if err := <-errs; err == nil {
			passed++
		} else if code := status.Code(err); code != codes.ResourceExhausted && code != codes.Unavailable {
			t.Error(err)
		}
	}
	if passed == 0 {
		t.Error("none of sixteen was mounted")
	}
	n.api.put(connector("default", "git", "hostile"))
	n.volume().mustPublish()
	p.wantSound(t)
}

// ---- What a renderer can do ----

const intruderKey = "CONNECTORS_CSI_TEST_INTRUDER"

// attempt is something that nobody shall be able to do in a renderer, and how it is refused.
type attempt struct {
	what    string
	refusal string // a regular expression
	try     func() error
}

// attempts are what code in a renderer may try, where something listens at the address outside.
func attempts(address string) []attempt {
	const none, readOnly, forbidden = "^no such file or directory$", "^read-only file system$", "^operation not permitted$"
	open := func(path string, flags int) func() error {
		return func() error {
			_, err := unix.Open(path, flags, 0o600)
			return err
		}
	}
	connect := func(family int, to unix.Sockaddr) func() error {
		return func() error {
			s, err := unix.Socket(family, unix.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			defer unix.Close(s)
			return unix.Connect(s, to)
		}
	}
	host := netip.MustParseAddrPort(address)
	// Go's own functions for these want all threads to do it.
	call := func(number uintptr, a ...uintptr) func() error {
		return func() error {
			if _, _, errno := unix.RawSyscall(number, a[0], a[1], a[2]); errno != 0 {
				return errno
			}
			return nil
		}
	}
	list := []attempt{
		{"read a file", none, open("/etc/passwd", unix.O_RDONLY)},
		{"read a file above the root", none, open("../../../../etc/passwd", unix.O_RDONLY)},
		{"read the driver's token", none, open(serviceAccountDir+"/token", unix.O_RDONLY)},
		{"read /proc", none, open("/proc/self/status", unix.O_RDONLY)},
		{"open the machine's memory", none, open("/dev/mem", unix.O_RDWR)},
		{"create a file", readOnly, open("/new", unix.O_CREAT|unix.O_WRONLY)},
		{"create a file without a name", readOnly, open("/", unix.O_TMPFILE|unix.O_RDWR)},
		{"create a directory", readOnly, func() error { return unix.Mkdir("/new", 0o700) }},
		{"create a device", readOnly, func() error { return unix.Mknod("/new", unix.S_IFCHR|0o600, 1<<8|1) }},
		{"see a file", "^there are 0$", func() error {
			if entries, err := os.ReadDir("/"); err != nil || len(entries) > 0 {
				return err
			}
			return errors.New("there are 0")
		}},
		{"write into a file that is memory", "^file too large$", func() error {
			file, err := unix.MemfdCreate("new", 0)
			if err != nil {
				return err
			}
			defer unix.Close(file)
			_, err = unix.Write(file, []byte("x"))
			return err
		}},
		{"connect to the API server", "^network is unreachable$",
			connect(unix.AF_INET, &unix.SockaddrInet4{Port: int(host.Port()), Addr: host.Addr().As4()})},
		{"connect to an abstract socket", "^connection refused$",
			connect(unix.AF_UNIX, &unix.SockaddrUnix{Name: "@" + address})},
		{"make a raw socket", forbidden, func() error {
			_,
				err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
			return err
		}},
		// which says that there may be none
		{"make a user namespace", forbidden + "|^no space left on device$", func() error {
			child, _, errno := unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
			if errno != 0 {
				return errno
			}
			if child == 0 {
				unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
			}
			return nil
		}},
		{"make a mount namespace", forbidden, func() error { return unix.Unshare(unix.CLONE_NEWNS) }},
		{"mount", forbidden, func() error { return unix.Mount("tmpfs", "/", "tmpfs", 0, "") }},
		{"make a filesystem", forbidden, func() error { _, err := unix.Fsopen("tmpfs", 0); return err }},
		{"unmount", forbidden, func() error { return unix.Unmount("/", unix.MNT_DETACH) }},
		{"change the root directory", forbidden, func() error { return unix.Chroot("/") }},
		// EINVAL: its user namespace has no other.
		{"become another user", forbidden + "|^invalid argument$", call(unix.SYS_SETRESUID, 12345, 12345, 12345)},
		{"become another group", forbidden + "|^invalid argument$", call(unix.SYS_SETRESGID, 12345, 12345, 12345)},
		{"leave its groups", forbidden, call(unix.SYS_SETGROUPS, 0, 0, 0)},
		{"gain a capability", forbidden, func() error {
			wanted := [2]unix.CapUserData{{Effective: 1 << unix.CAP_KILL, Permitted: 1 << unix.CAP_KILL}}
			return unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &wanted[0])
		}},
		{"set the host name", forbidden, func() error { return unix.Sethostname([]byte("x")) }},
		{"run a program", none, func() error { return unix.Exec("/bin/sh", []string{"sh"}, nil) }},
		{"run itself", none, func() error { return unix.Exec("/proc/self/exe", []string{"sh"}, nil) }},
		{"see its parent", "^0$", func() error { return isNumber(os.Getppid()) }},
		{"see another process", "^no such process$", func() error {
			for pid := 2; pid < 1<<10; pid++ { // more take an emulated processor too long
				if _, err := unix.PidfdOpen(pid, 0); err == nil {
					return nil
				}
			}
			return unix.Kill(-1, 0)
		}},
		{"be in its parent's group", "^1$", func() error { return isNumber(unix.Getpgrp()) }},
		{"be more important", "^permission denied$", func() error { return unix.Setpriority(unix.PRIO_PROCESS, 0, 18) }},
		{"be looked into", "^0$", func() error {
			dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
			return cmp.Or(err, isNumber(dumpable))
		}},
		{"find something in the environment", "^GOMAXPROCS=1 GOMEMLIMIT=[0-9]+ GOTRACEBACK=none MALLOC_ARENA_MAX=1$",
			func() error {
				os.Unsetenv(intruderKey)
				variables := os.Environ()
				slices.Sort(variables)
				return errors.New(strings.Join(variables, " "))
			}},
		{"print something", "^bad file descriptor$", func() error { _, err := unix.Write(2, []byte("x")); return err }},
		{"find a descriptor", "^none$", func() error {
			for fd := 3; fd < 1024; fd++ {
				var stat unix.Stat_t
				// Those without a type are Go's own, and the pipe is this test's.
				if unix.Fstat(fd, &stat) == nil && stat.Mode&unix.S_IFMT != 0 && stat.Mode&unix.S_IFMT != unix.S_IFIFO {
					return fmt.Errorf("%d is of mode %o", fd, stat.Mode)
				}
			}
			return errors.New("none")
		}},
	}
	list = append(list, attempt{"start processes without end", "^resource temporarily unavailable$", func() error {
		// Go ends a process in which it gets no thread, so that it has some in reserve.
		var started, ended sync.WaitGroup
		release := make(chan struct{})
		for range 8 {
			started.Add(1)
			ended.Go(func() {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				started.Done()
				<-release
			})
		}
		started.Wait()
		close(release)
		ended.Wait()
		var err error
		for range 100 {
			child, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
			for errno == 0 && child == 0 {
				unix.RawSyscall6(unix.SYS_PPOLL, 0, 0, 0, 0, 0, 0)
			}
			if errno != 0 {
				err = errno
				break
			}
		}
		unix.RawSyscall(unix.SYS_KILL, ^uintptr(0), uintptr(unix.SIGKILL), 0)
		for errno := unix.Errno(0); errno == 0 || errno == unix.EINTR; {
			_, _, errno = unix.RawSyscall6(unix.SYS_WAIT4, ^uintptr(0), 0, 0, 0, 0, 0)
		}
		return err
	}})
	for name, resource := range sorted(map[string]int{"AS": unix.RLIMIT_AS, "DATA": unix.RLIMIT_DATA,
		"CPU": unix.RLIMIT_CPU, "FSIZE": unix.RLIMIT_FSIZE,
		"NOFILE": unix.RLIMIT_NOFILE, "NPROC": unix.RLIMIT_NPROC, "CORE": unix.RLIMIT_CORE, "MEMLOCK": unix.RLIMIT_MEMLOCK}) {
		list = append(list, attempt{"raise RLIMIT_" + name, forbidden, func() error {
			var limit unix.Rlimit
			if err := unix.Getrlimit(resource, &limit); err != nil {
				return err
			}
			limit.Max++
			return unix.Setrlimit(resource, &limit)
		}})
	}
	return list
}

func isNumber(n int) error { return errors.New(strconv.Itoa(n)) }

// intrude makes all attempts in a renderer that is ready to work, and answers with their outcomes.
func intrude(address string) {
	signal.Ignore(unix.SIGXFSZ)
	outcomes := map[string]string{}
	for _, a := range attempts(address) {
		outcomes[a.what] = fmt.Sprint(a.try())
	}
	text, _ := json.Marshal(outcomes)
	writeFrame(os.Stdout, frameName, []byte("outcomes"))
	writeFrame(os.Stdout, frameContent, text)
	writeFrame(os.Stdout, frameDone, nil)
}

// renderedBy starts a node whose renderers are this program by another name.
func renderedBy(t *testing.T, name string) *node {
	t.Helper()
	dir, err := os.MkdirTemp(containerDir, "")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	link := filepath.Join(dir, name)
	must(t, cmp.Or(os.Chmod(dir, 0o755), os.Symlink(rendererBinary(), link))) // another user gets to it
	return startNode(t, func(d *driver) { d.renderers.binary = link })
}

// mayChooseUser reports whether the tests run as root of the machine, or as somebody who is alone in a user namespace.
func mayChooseUser(t *testing.T) bool {
	t.Helper()
	text, err := os.ReadFile("/proc/self/uid_map")
	must(t, err)
	return strings.Fields(string(text))[2] != "1"
}

// skipWithoutUserNamespaces skips a confinement with these flags where the node makes no user namespaces.
func skipWithoutUserNamespaces(t *testing.T, flags uintptr) {
	t.Helper()
	limit, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	must(t, err)
	if flags&unix.CLONE_NEWUSER != 0 && string(limit) == "0\n" {
		t.Skip("user namespaces are switched off")
	}
}

func TestRendererCanDoNothing(t *testing.T) {
	server, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer server.Close()
	address := server.Addr().String()
	abstract, err := net.Listen("unix", "@"+address)
	must(t, err)
	defer abstract.Close()
	inherited, err := unix.Open("/etc/passwd", unix.O_RDONLY, 0) // as whoever starts the driver may have it
	must(t, err)
	defer unix.Close(inherited)
	all := confinements
	t.Cleanup(func() { confinements = all })
	for i, c := range all {
		t.Run(fmt.Sprint(c.name, i), func(t *testing.T) {
			if c.flags == 0 {
				t.Skip("there it sees the node's files and processes, as any user of the node does")
			}
			if !mayChooseUser(t) && c.name != "same user" {
				t.Skip("only root may choose another user")
			}
			skipWithoutUserNamespaces(t, c.flags)
			confinements = all[i : i+1]
			v := renderedBy(t, "intruder-"+address).volume()
			v.mustPublish()
			var outcomes map[string]string
			must(t, json.Unmarshal([]byte(v.file("outcomes")), &outcomes))
			for _, a := range attempts(address) {
				ofProcesses := a.what == "start processes without end" || a.what == "raise RLIMIT_NPROC"
				if ofProcesses && (!countsProcesses(c.name) || c.uid == 0 && mayChooseUser(t)) {
					continue // there it would be a limit of all processes of that user on the node, or root's, who has none
				}
				if !regexp.MustCompile(a.refusal).MatchString(outcomes[a.what]) {
					t.Errorf("%s: %q, not %q", a.what, outcomes[a.what], a.refusal)
				}
			}
		})
	}
}

// renderers returns the renderers of a driver inside the test process, which has no other children.
func (n *node) renderers() []int {
	n.t.Helper()
	return slices.Sorted(maps.Keys(children(n.t, os.Getpid())))
}

// What the kernel says of a renderer that is ready to work.
func TestRendererIsConfined(t *testing.T) {
	if mayChooseUser(t) {
		must(t, unix.Setgroups([]int{12345})) // as a Pod's supplementalGroups do
		t.Cleanup(func() { unix.Setgroups(nil) })
	}
	all := confinements
	t.Cleanup(func() { confinements = all })
	for i, c := range all {
		t.Run(fmt.Sprint(c.name, i), func(t *testing.T) {
			if !mayChooseUser(t) && (c.uid != os.Getuid() || c.name == "root") {
				t.Skip("only root may choose another user")
			}
			skipWithoutUserNamespaces(t, c.flags)
			confinements = all[i : i+1]
			n := startNode(t)
			n.volume().mustPublish()
			pid := n.renderers()[0]
			uid := strconv.Itoa(c.uid)
			if c.flags&unix.CLONE_NEWUSER == 0 && mayChooseUser(t) {
				uid = strconv.Itoa(rendererUID)
			}
			for field, want := range sorted(map[string]string{
				"Uid": strings.TrimSuffix(strings.Repeat(uid+" ", 4), " "),
				"Gid": strings.TrimSuffix(strings.Repeat(uid+" ", 4), " "), "NoNewPrivs": "1",
				"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000",
				"CapBnd": "0000000000000000", "CapAmb": "0000000000000000",
			}) {
				if got := processStatus(t, pid, field); got != want {
					t.Errorf("%s is %s, not %s", field, got, want)
				}
			}
			if groups := processStatus(t, pid, "Groups"); groups != "" && c.name != "same user" { // which may not leave them
				t.Errorf("it is in the groups %s", groups)
			}
			for name, flag := range sorted(map[string]uintptr{"user": unix.CLONE_NEWUSER, "mnt": unix.CLONE_NEWNS,
				"net": unix.CLONE_NEWNET, "pid": unix.CLONE_NEWPID, "ipc": unix.CLONE_NEWIPC}) {
				its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, name))
				must(t, err)
				ours, err := os.Readlink("/proc/self/ns/" + name)
				must(t, err)
				if (its != ours) != (c.flags&flag != 0) {
					t.Errorf("its namespace %s is %s, and ours is %s", name, its, ours)
				}
			}
			limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
			must(t, err)
			for name, most := range sorted(map[string]int{
				"address space": kilobytes(t, pid, "VmSize")<<10 + 72<<20, "data size": kilobytes(t, pid, "VmData")<<10 + 72<<20,
				"cpu time": 5, "file size": 0, "open files": 16, "core file size": 0, "locked memory": 0, "processes": 32,
			}) {
				if name == "processes" && !countsProcesses(c.name) {
					continue
				}
				match := regexp.MustCompile("Max " + name + ` +(\d+) +(\d+) `).FindStringSubmatch(string(limits))
				if match == nil {
					t.Errorf("the %s is not limited", name)
				} else if hard, _ := strconv.Atoi(match[2]); hard > most {
					t.Errorf("the limit of the %s is %d, more than %d", name, hard, most)
				}
			}
			if nice, err := unix.Getpriority(unix.PRIO_PROCESS, pid); nice != 1 || err != nil { // 20-nice, as the kernel has it
				t.Errorf("its priority is %d, %v", nice, err)
			}
			if score, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid)); string(score) != "1000\n" {
				t.Errorf("oom_score_adj is %q, %v", score, err)
			}
			said := strings.Contains(n.log.String(), fmt.Sprintf("missing=%q", c.missing))
			if c.missing != "" && !said {
				t.Errorf("the log does not say that it lacks %s", c.missing)
			}
		})
	}
}

// What is not wanted of an object takes no memory, however it is made.
func TestScanTakesNoMemory(t *testing.T) {
	many := func(format string) string {
		var b strings.Builder
		for i := 0; b.Len() < maxObjectBytes-100; i++ {
			fmt.Fprintf(&b, format, i)
		}
		return strings.TrimSuffix(b.String(), ",")
	}
	for what, text := range sorted(map[string]string{
		"names":         `{"metadata":{` + many(`"a%d":"",`) + `}}`,
		"escaped names": `{"spec":{` + many(`"\u0061%d":"",`) + `}}`,
		"names above":   `{` + many(`"%d":{},`) + `}`,
		"numbers":       `{"status":[` + many(`%d,`) + `]}`,
		"strings":       `{"status":{"proxy":[` + many(`"\n%d",`) + `]}}`,
		"one string":    `{"status":{"url":"` + many(`\"%d`) + `"}}`,
		"objects": `{"status":{"proxy":{"x":` + strings.Repeat(`{"proxy":`, 9000) + `1` + strings.Repeat("}", 9000) +
			`}}}`,
	}) {
		if !json.Valid([]byte(text)) {
			t.Fatalf("%s: not JSON", what)
		}
		raw := []byte(text)
		if got := testing.AllocsPerRun(2, func() {
			if _, err := parseObject(raw); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}); got > 40 { // for what is wanted
			t.Errorf("%s: %v allocations", what, got)
		}
	}
}
