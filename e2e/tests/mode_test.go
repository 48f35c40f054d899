package tests

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/image"
	"connectors-csi/e2e/machine"
	"connectors-csi/e2e/node"
)

// Tools that refuse a file for its mode or its owner. They run in Pods, as the users that the Pods say.

const ownerImage = "localhost/owner:1" // busybox, psql and glab

// ownerImageFiles are those of that image. Debian's command psql is a script, which looks for the program.
func ownerImageFiles() ([]image.File, error) {
	glab, err := glab()
	if err != nil {
		return nil, err
	}
	programs, err := image.LinkedFiles(psql(), glab)
	if err != nil {
		return nil, err
	}
	files, err := image.BusyboxFiles()
	links := []image.File{{Name: "bin/psql", Link: psql()}, {Name: "bin/glab", Link: glab}}
	return slices.Concat(files, programs, links), err
}

func glab() (string, error) {
	dir, err := machine.Packages{Suites: []string{"trixie"}, Arch: runtime.GOARCH, Names: []string{"glab"}}.Unpack()
	return filepath.Join(dir, "usr/bin/glab"), err
}

// psql returns the program's path, if it is there.
func psql() string {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/psql")
	if len(found) == 0 {
		return ""
	}
	return found[len(found)-1]
}

// ownerPod is a Pod with three containers: two of the user 1000, of which one looks at the files all the time and says
// in /tmp/seen what it has seen, and one of the user 1001. The lines are fields of its spec, and of its security
// context.
func ownerPod(name, attributes, fields, securityContext string) string {
	const container = `
  - name: %s
    image: %s
    command: [sh, -c, %q]
    securityContext: {runAsUser: %d, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    volumeMounts:
    - {name: volume, mountPath: /volume}
    - {name: volume, mountPath: /etc/glab/config.yml, subPath: config.yml}`
	const look = `while usleep 2000; do
		cat /volume/address >/dev/null || echo "address cannot be read"
		stat -Lc '%a %u %g' /volume/address /volume /volume/..data | xargs
		echo x >>/tmp/looks
	done 2>&1 | awk '!seen[$0]++ { print; fflush() }' >/tmp/seen`
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}, %s}
  containers:`, name, securityContext) +
		fmt.Sprintf(container, "main", ownerImage, "sleep infinity", 1000) +
		fmt.Sprintf(container, "looks", ownerImage, look, 1000) +
		fmt.Sprintf(container, "second", ownerImage, "sleep infinity", 1001) + fmt.Sprintf(`
  volumes:
  - name: volume
    csi: {driver: connectors-csi, readOnly: true, volumeAttributes: %s}
  %s
`, attributes, fields)
}

func TestToolsThatInsistOnOwnerAndMode(t *testing.T) {
	files, err := ownerImageFiles()
	if err != nil {
		t.Fatal(err)
	}
	if err := image.Import(image.New(ownerImage, nil, files)); err != nil {
		t.Fatal(err)
	}
	ns := beside(t)
	ns.target("owner", map[string]string{
		"address":    "{{ .connector.spec.address }}",
		".pgpass":    "*:*:*:*:{{ .context.token }}\n",
		"config.yml": "hosts:\n  gitlab.example.com:\n    token: {{ .context.token }}\n",
	})
	const mount = `{connector.name: target, configuration.names: config, %s}`
	type ownedPod struct {
		attributes, fields, securityContext string
		seen                                string // modes, owners and groups of a file, the directory and the generation
		accepted                            bool   // by glab and psql
		second                              bool   // whether the second user may read
	}
	pods := map[string]ownedPod{
		"owner": {`file.mode: "0600", file.owner: "1000"`, "", "", "600 1000 0 500 1000 0 500 1000 0", true, false},
		"owner-group": {`file.mode: "0600", file.owner: "1000"`, "", "fsGroup: 2000",
			"600 1000 2000 500 1000 2000 500 1000 2000", true, false},
		"default":     {``, "", "", "444 0 0 555 0 0 555 0 0", false, true},
		"owner-alone": {`file.owner: "1000"`, "", "", "444 1000 0 555 1000 0 555 1000 0", false, true},
		"owner-of-group": {`file.owner: "1000"`, "", "fsGroup: 2000",
			"440 1000 2000 550 1000 2000 550 1000 2000", false, true},
		"mode-of-group": {`file.mode: "0640"`, "", "fsGroup: 2000", "640 0 2000 550 0 2000 550 0 2000", false, true},
	}
	if release := os.Getenv(cluster.EnvRelease); release == "" ||
		release >= "1.33" { // see TestPodsInAUserNamespaceOfTheirOwn
		pods["user-namespace"] = pods["owner"]
	}
	for name, p := range sorted(pods) {
		if name == "user-namespace" {
			p.fields = "hostUsers: false"
		}
		ns.apply(ownerPod(name, fmt.Sprintf(mount, p.attributes), p.fields, p.securityContext))
	}
	ns.apply(cluster.PodManifest("refused", fmt.Sprintf(mount, `file.mode: "0755"`)))
	ns.refused("refused", "code = InvalidArgument desc = file.mode 0755 has execute, set-id or sticky bits", "use 0644")

	in := func(pod, container, script string) (string, error) {
		output, err := exec.Command("kubectl", "--namespace", ns.name, "exec", pod, "--container", container,
			"--", "sh", "-c", script).CombinedOutput()
		return strings.TrimSpace(string(output)), err
	}
	check := func(name string, p ownedPod) {
		t.Helper()
		token := strings.TrimPrefix(ns.read(name, "/volume/.pgpass"), "*:*:*:*:")
		subPath := "hosts:\n  gitlab.example.com:\n    token: "
		subPathToken := strings.TrimSpace(strings.TrimPrefix(ns.read(name, "/etc/glab/config.yml"), subPath))

		// glab accepts exactly 0600, in the volume, by links, and by subPath.
		for dir, want := range map[string]string{"/volume": strings.TrimSpace(token), "/etc/glab": subPathToken} {
			output, err := in(name, "main", "HOME=/tmp GLAB_CONFIG_DIR="+dir+" glab config get token --host gitlab.example.com")
			accepted := err == nil && output == want
			if accepted != p.accepted || !accepted && !strings.Contains(output, "but glab requires 600") {
				t.Errorf("Pod %s: glab with %s: %v: %s", name, dir, err, output)
			}
		}

		// psql takes a password from a file only if nobody else may read it.
		server := newPostgres(t)
		output, _ := in(name, "main", fmt.Sprintf("PGPASSFILE=/volume/.pgpass psql --no-password --host=%s --port=%s "+
			"--username=u --command='select 1' 'dbname=d sslmode=disable gssencmode=disable'", server.host, server.port))
		switch {
		case p.accepted && (!strings.Contains(output, server.refusal) || server.password() != strings.TrimSpace(token)):
			t.Errorf("Pod %s: psql has not sent the password of its file: %s", name, output)
		case !p.accepted && !strings.Contains(output, "has group or world access"):
			t.Errorf("Pod %s: psql takes a file that others may read: %s", name, output)
		}

		// The second user reads nothing, neither by subPath.
		for _, path := range []string{"/volume/.pgpass", "/volume/..data/address", "/etc/glab/config.yml"} {
			output, err := in(name, "second", `[ "$(id -u)" = 1001 ] && cat `+path)
			denied := err != nil && strings.Contains(output, "Permission denied")
			if p.second != (err == nil) || p.second == denied {
				t.Errorf("Pod %s: the second user with %s: %v: %s", name, path, err, output)
			}
		}
		for _, command := range []string{"true > /volume/address", "chmod 644 /volume/address", "chmod 777 /volume",
			"rm /volume/address", "chmod 644 /etc/glab/config.yml"} {
			output, err := in(name, "main", command)
			if err == nil || p.accepted && !strings.Contains(output, "Read-only file system") {
				t.Errorf("Pod %s: the owner could %q: %v: %s", name, command, err, output)
			}
		}
	}
	for name, p := range sorted(pods) {
		ns.running(name)
		check(name, p)
	}
	for i := range 5 {
		ns.moveTo(fmt.Sprintf("https://%d.example.com", i), "owner", "/volume/address")
	}
	for name, p := range sorted(pods) {
		ns.eventually(func() error { return ns.has(name, "/volume/address", "https://4.example.com") })
		check(name, p)
		if seen, err := in(name, "looks", "cat /tmp/seen"); err != nil || seen != p.seen {
			t.Errorf("Pod %s: seen during updates are %q (%v), not only %q", name, seen, err, p.seen)
		}
		if looks, err := in(name, "looks", `[ "$(wc -l </tmp/looks)" -ge 100 ]`); err != nil {
			t.Errorf("Pod %s: it has hardly looked: %s", name, looks)
		}
	}
	for name := range sorted(pods) {
		uid := ns.uid(name)
		ns.deletePod(name)
		ns.gone(uid)
	}
}

// postgres is as much of a PostgreSQL server as asks for a password and refuses it.
type postgres struct {
	host, port, refusal string
	passwords           chan string
}

// password is the one that a client has sent, if any.
func (p postgres) password() string {
	select {
	case password := <-p.passwords:
		return password
	default:
		return ""
	}
}

// newPostgres serves one client in the messages of PostgreSQL's protocol, version 3:
// https://www.postgresql.org/docs/current/protocol-message-formats.html
func newPostgres(t *testing.T) postgres {
	t.Helper()
	listener, err := net.Listen("tcp", node.IP+":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	host, port, _ := net.SplitHostPort(listener.Addr().String())
	p := postgres{host, port, "the password has come", make(chan string, 1)}
	message := func(kind string, content []byte) []byte {
		return append(binary.BigEndian.AppendUint32([]byte(kind), uint32(len(content)+4)), content...)
	}
	read := func(conn net.Conn, kind int) (string, error) { // a message after so many bytes of its kind
		header := make([]byte, kind+4)
		if _, err := io.ReadFull(conn, header); err != nil {
			return "", err
		}
		content := make([]byte, binary.BigEndian.Uint32(header[kind:])-4)
		_, err := io.ReadFull(conn, content)
		return strings.TrimRight(string(content), "\x00"), err
	}
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		if _, err := read(conn, 0); err != nil { // StartupMessage
			return
		}
		conn.Write(message("R", []byte{0, 0, 0, 3})) // AuthenticationCleartextPassword
		password, err := read(conn, 1)
		if err != nil {
			return
		}
		p.passwords <- password
		conn.Write(message("E", []byte("SFATAL\x00C28P01\x00M"+p.refusal+"\x00\x00"))) // ErrorResponse
	}()
	return p
}
