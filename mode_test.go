package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// Whose a volume's files are, and with what mode. The drivers here are processes of their own, with the eight
// capabilities of a node's driver: root of the machine could do more.

// belonging is what file.mode, file.owner and the Pod's fsGroup say, each empty where it says nothing.
type belonging struct{ mode, owner, group string }

// ask makes kubelet's next calls say so.
func (v *podVolume) ask(b belonging) {
	v.attributes["file.mode"], v.attributes["file.owner"], v.change = b.mode, b.owner, group(b.group)
}

// access is what it comes to.
func (b belonging) access() permissions {
	number := func(text string, base int) int {
		n, _ := strconv.ParseInt(cmp.Or(text, "0"), base, 64)
		return int(n)
	}
	mode := b.mode
	if mode == "" {
		mode = map[bool]string{true: "0440", false: "0444"}[b.group != ""]
	}
	return permissions{number(b.owner, 10), number(b.group, 10), fs.FileMode(number(mode, 8))}
}

// mayRead reports whether a user with one group and no capability may read files.
func (a permissions) mayRead(uid, gid int) bool {
	switch {
	case uid == a.uid:
		return a.mode&0o400 != 0
	case gid == a.gid:
		return a.mode&0o040 != 0
	}
	return a.mode&0o004 != 0
}

// belongs returns what is wrong with one path's mode and owners.
func (a permissions) belongs(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	want := a.mode
	if info.IsDir() {
		want = 0
		for _, bits := range []fs.FileMode{0o500, 0o050, 0o005} {
			if a.mode&bits != 0 {
				want |= bits
			}
		}
		want |= fs.ModeDir
	}
	is := info.Sys().(*syscall.Stat_t)
	if info.Mode() != want || int(is.Uid) != a.uid || int(is.Gid) != a.gid {
		return fmt.Errorf("%s has mode %v, owner %d and group %d, not %v, %d and %d", filepath.Base(path),
			info.Mode(), is.Uid, is.Gid, want, a.uid, a.gid)
	}
	return nil
}

// wantBelongs checks the volume's directories and files, the links of which are followed.
func (v *podVolume) wantBelongs(b belonging) {
	v.t.Helper()
	for name := range v.read() {
		if err := b.access().belongs(v.target + "/" + name); err != nil {
			v.t.Errorf("%+v: %v", b, err)
		}
	}
	for _, dir := range []string{"", "/..data"} {
		if err := b.access().belongs(v.target + dir); err != nil {
			v.t.Errorf("%+v: %v", b, err)
		}
	}
}

// usersHere is how many users the tests' user namespace has, of those that the first is root of.
func usersHere(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile("/proc/self/uid_map")
	must(t, err)
	count, err := strconv.Atoi(strings.Fields(string(text))[2])
	must(t, err)
	return count
}

// someUsers are those of the IDs that files may be given to here, and root.
func someUsers(t *testing.T, ids ...string) []string {
	t.Helper()
	ids = slices.DeleteFunc(ids, func(id string) bool {
		uid, err := strconv.Atoi(id)
		must(t, err)
		return uid >= usersHere(t)
	})
	return append(ids, "", "0")
}

func TestModesAndOwners(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.startProcess()
	modes := []string{"", "0444", "444", "0400", "600", "0640", "0660", "0666", "0420", "0040", "0004", "0264"}
	for _, mode := range modes {
		for _, owner := range someUsers(t, "1000", "65536", "2147483647") {
			for _, group := range someUsers(t, "2000", "2147483647") {
				b := belonging{mode, owner, group}
				v := n.volume()
				v.ask(b)
				v.mustPublish()
				v.wantBelongs(b)
				v.pod.renewToken()
				v.mustPublish()
				v.wantBelongs(b)
				v.wantClean()
				v.want("token", v.pod.token)
				v.mustUnpublish()
			}
		}
	}
}

// Only a new Pod, or another version of the driver, can want another mode or owner. The files say whose they are, and
// users who look all the time read none that is not theirs. A file that was theirs until then is not theirs any more
// afterwards, although it is still there.
func TestModeAndOwnerChange(t *testing.T) {
	n := newNode(t)
	n.startProcess()
	v := n.volume()
	all := []belonging{{"", "", ""}, {"", "", "0"}, {"0400", "", ""}, {"0040", "0", ""}, {"0004", "", ""}}
	if mayChooseUser(t) {
		all = append(all, belonging{"0600", "1000", ""}, belonging{"", "1000", "2000"},
			belonging{"0640", "1001", "2001"}, belonging{"0040", "1000", "2000"})
	}
	publish := func(b belonging) {
		v.ask(b)
		text := strings.Join([]string{b.mode, b.owner, b.group, "end"}, " ")
		n.api.put(gitClassOf("file", text))
		v.mustPublish()
		v.wantBelongs(b)
		v.wantClean()
	}
	publish(all[0])
	container := startContainer(t, v)
	whose := func(text string) permissions {
		f := strings.Split(text, " ")
		if len(f) != 4 || f[3] != "end" {
			t.Errorf("a part of a file: %q", text)
			return permissions{}
		}
		return belonging{f[0], f[1], f[2]}.access()
	}
	type user struct{ uid, gid int }
	users := []user{{1000, 1000}, {1001, 2000}, {1002, 2001}, {1003, 1003}}
	var reads [4]atomic.Int64
	stop := make(chan struct{})
	done := make(chan bool)
	if mayChooseUser(t) {
		for i, u := range users {
			go asUser(u.uid, u.gid, func() {
				defer func() { done <- true }()
				for {
					select {
					case <-stop:
						return
					default:
					}
					paths, _ := filepath.Glob(container + "/..gen-*/file")
					for _, path := range append(paths, container+"/file") {
						text, err := os.ReadFile(path)
						if err == nil && !whose(string(text)).mayRead(u.uid, u.gid) {
							t.Errorf("user %v has read a file of %q", u, text)
						}
						if err == nil {
							reads[i].Add(1)
						}
					}
				}
			})
		}
	}
	for i, from := range all {
		for next := range times(1, len(all)) {
			to := all[(i+1+next)%len(all)]
			publish(from)
			old, err := filepath.EvalSymlinks(v.target + "/..data")
			must(t, err)
			publish(to)
			if !mayChooseUser(t) || from == to {
				continue
			}
			for _, u := range users {
				ok := make(chan error)
				go asUser(u.uid, u.gid, func() {
					_, err := os.ReadFile(container + "/" + filepath.Base(old) + "/file")
					ok <- err
				})
				if err := <-ok; err == nil && !(from.access().mayRead(u.uid, u.gid) && to.access().mayRead(u.uid, u.gid)) {
					t.Errorf("from %+v to %+v: user %v still reads the old file", from, to, u)
				}
			}
		}
	}
	close(stop)
	if mayChooseUser(t) {
		for i := range users {
			<-done
			if reads[i].Load() == 0 {
				t.Errorf("user %v has never read anything", users[i])
			}
		}
	}
	v.mustUnpublish()
}

// asUser does something as another user, with one group and no capability, on a thread that ends with it.
func asUser(uid, gid int, do func()) {
	runtime.LockOSThread()
	for _, call := range [][4]uintptr{{unix.SYS_SETGROUPS}, {unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)},
		{unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)}} {
		if _, _, errno := syscall.RawSyscall(call[0], call[1], call[2], call[3]); errno != 0 {
			panic(errno)
		}
	}
	do()
}

// During updates, 300 in long tests, the owner of a file that is nobody else's reads it, and sees the same mode and
// owner each time.
func TestUpdatesKeepModeAndOwner(t *testing.T) {
	n := newNode(t)
	n.startProcess()
	b := belonging{mode: "0400", owner: someUsers(t, "1000")[0]}
	v := n.volume()
	v.ask(b)
	publish := func(i int) {
		n.api.put(gitClassOf("file", fmt.Sprintf("%d\n%s", i, strings.Repeat("x", 5000))))
		v.mustPublish()
	}
	publish(0)
	container := startContainer(t, v)
	stop, result, reads := make(chan struct{}), make(chan error, 1), 0
	var begun, done atomic.Int64 // updates
	look := func() {
		for {
			select {
			case <-stop:
				result <- nil
				return
			default:
			}
			current := done.Load()
			err := readNames(container, []string{"file"})
			for _, path := range []string{container, container + "/..data", container + "/file"} {
				err = cmp.Or(err, b.access().belongs(path))
			}
			if errors.Is(err, fs.ErrNotExist) && begun.Load() >= current+2 {
				continue
			}
			if err != nil {
				result <- err
				return
			}
			reads++
		}
	}
	if mayChooseUser(t) {
		go asUser(1000, 1000, look)
	} else {
		go look()
	}
	for i := 1; i <= times(60, 300) && len(result) == 0; i++ {
		begun.Add(1)
		publish(i)
		done.Add(1)
	}
	close(stop)
	if err := <-result; err != nil {
		t.Error(err)
	}
	if reads < times(20, 100) {
		t.Errorf("only %d reads", reads)
	}
	v.wantBelongs(b)
	v.mustUnpublish()
}

// A driver that is killed while it gives the files to somebody else leaves them readable to no more than before and
// after, and the next one completes it.
func TestKilledWhileTheOwnerChanges(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	of := []belonging{{"0400", someUsers(t, "1000")[0], ""}, {"0640", "", someUsers(t, "2000")[0]}, {}}
	v := n.volume()
	v.ask(of[0])
	for round := range 9 {
		p := n.startProcess()
		v.mustPublish()
		updating := make(chan int)
		go func() {
			i := 0
			for err := error(nil); err == nil; i++ {
				v.ask(of[i%3])
				err = v.publish()
			}
			updating <- i
		}()
		time.Sleep(time.Duration(round) * 3 / 2 * time.Millisecond) // another moment each time
		p.kill()
		n.conn.Close() // or the next call would wait for another driver
		<-updating
		v.want("token", v.pod.token)
	}
	n.startProcess()
	for _, b := range of {
		v.ask(b)
		v.mustPublish()
		v.wantBelongs(b)
		v.wantClean()
	}
	v.mustUnpublish()
}

func TestRestartKeepsModeAndOwner(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	b := belonging{"0004", someUsers(t, "1000")[0], someUsers(t, "2000")[0]}
	p := n.startProcess()
	v := n.volume()
	v.ask(b)
	v.settle()
	wantUnchanged := v.unchangedFromNow()
	p.kill()
	v.wantBelongs(b)
	n.startProcess()
	v.mustPublish()
	v.wantBelongs(b)
	wantUnchanged()

	// What somebody keeps open of a volume is emptied, also where its owner may neither read nor write it.
	file, err := os.Open(v.target + "/token")
	must(t, err)
	defer file.Close()
	v.pod.renewToken()
	v.mustPublish()
	current, err := os.Open(v.target + "/token")
	must(t, err)
	defer current.Close()
	v.mustUnpublish()
	for _, f := range []*os.File{file, current} {
		if info, err := f.Stat(); err != nil || f == current && info.Size() != 0 {
			t.Errorf("%d bytes are left of a file after unpublish, %v", info.Size(), err)
		}
	}
}

// The owner of a file on a read-only mount changes neither the file nor the mount, not even as root of a user
// namespace of his own.
func TestOwnersCannotWrite(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.startProcess()
	b := belonging{mode: "0600", owner: someUsers(t, "1000")[0]}
	v := n.volume()
	v.ask(b)
	v.mustPublish()
	uid := b.access().uid
	container := fmt.Sprintf("%s/%d", containerDir, serial.Add(1))
	must(t, os.Mkdir(container, 0o755))
	must(t, unix.Mount(v.target, container, "", unix.MS_BIND, "")) // a runtime would make it read-only once more
	t.Cleanup(func() { unix.Unmount(container, unix.MNT_DETACH) })
	script := `cd "$1" || exit
		cat token >/dev/null || echo "token cannot be read"
		for command in "$@"; do
			[ "$command" = "$1" ] || ! eval "$command" 2>/dev/null || echo "$command succeeded"
		done`
	attempts := []string{"true > token", "chmod 0644 token", "chmod 0755 .", "chmod 0755 ..data/", "rm token",
		"mv token other", "touch new", "mkdir new", "ln token new", "ln -sfn x ..data", "mount -o remount,rw .",
		"mount -o remount,bind,rw .", "mount --bind . . && mount -o remount,bind,rw .", "mount -o remount,size=1g ."}
	const ofHisOwn = unix.CLONE_NEWUSER | unix.CLONE_NEWNS
	for what, flags := range sorted(map[string]uintptr{"himself": 0, "root of his own": ofHisOwn}) {
		cmd := exec.Command("sh", append([]string{"-c", script, "sh", container}, attempts...)...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL}
		switch {
		case flags != 0:
			himself := []syscall.SysProcIDMap{{HostID: uid, Size: 1}}
			cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = himself, himself
			cmd.SysProcAttr.Credential = &syscall.Credential{NoSetGroups: true}
		case mayChooseUser(t):
			cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}
		default:
			continue // he is root of this one
		}
		if output, err := runCommand(cmd); err != nil || len(output) > 0 {
			t.Errorf("%s: %v: %s", what, err, output)
		}
	}
	v.wantBelongs(b)
	v.want("token", v.pod.token)
}

// A generation is one of its files and of who may read them.
func TestDigestHasModeAndOwner(t *testing.T) {
	t.Parallel()
	f := files{"file": []byte("text")}
	seen := map[string]permissions{}
	for _, a := range []permissions{{}, {uid: 1}, {gid: 1}, {mode: 1}, {uid: 11}, {gid: 11}, {1, 1, 0}, {1, 0, 1},
		{0, 1, 1}, {1, 1, 1}, {11, 1, 0}, {1, 11, 0}} {
		d := digest(f, a)
		if other, ok := seen[d]; ok {
			t.Errorf("%v and %v have the same digest", other, a)
		}
		seen[d] = a
	}
}

func TestModesAndOwnersRefused(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	for what, c := range sorted(map[string]struct{ mode, owner, words string }{
		"a name": {"rw-------", "",
			`file.mode "rw-------" is not an octal mode of three or four digits, such as 0600`},
		"a change":      {"u=rw", "", `file.mode "u=rw" is not an octal mode`},
		"0o":            {"0o600", "", `file.mode "0o600" is not an octal mode`},
		"0x":            {"0x180", "", `file.mode "0x180" is not an octal mode`},
		"decimal":       {"384", "", `file.mode "384" is not an octal mode`},
		"nine":          {"0490", "", `file.mode "0490" is not an octal mode`},
		"five digits":   {"00600", "", `file.mode "00600" is not an octal mode`},
		"two digits":    {"44", "", `file.mode "44" is not an octal mode`},
		"zero":          {"0", "", `file.mode "0" is not an octal mode`},
		"negative mode": {"-600", "", `file.mode "-600" is not an octal mode`},
		"a plus":        {"+600", "", `file.mode "+600" is not an octal mode`},
		"an underscore": {"0_60", "", `file.mode "0_60" is not an octal mode`},
		"space before":  {" 600", "", `file.mode " 600" is not an octal mode`},
		"space after":   {"600 ", "", `file.mode "600 " is not an octal mode`},
		"only a space":  {" ", "", `file.mode " " is not an octal mode`},
		"line break":    {"600\n", "", `file.mode "600\n" is not an octal mode`},
		"other digits":  {"٠٦٠٠", "", `is not an octal mode`},
		"very long":     {strings.Repeat("0", 30000), "", `is not an octal mode`},
		"execute": {"0755", "",
			`file.mode 0755 has execute, set-id or sticky bits, which the files never have: use 0644`},
		"one execute": {"0641", "", `file.mode 0641 has execute`},
		"set-user-id": {"4600", "",
			`file.mode 4600 has execute, set-id or sticky bits, which the files never have: use 0600`},
		"set-group-id": {"2640", "", `use 0640`},
		"sticky":       {"1444", "", `use 0444`},
		"a user ID":    {"1000", "", `file.mode 1000 lets nobody read the files: use one with a read bit, such as 0600`},
		"nothing":      {"0000", "", `file.mode 0000 lets nobody read the files`},
		"write only":   {"0222", "", `file.mode 0222 lets nobody read the files`},
		"execute only": {"111", "", `file.mode 111 lets nobody read the files`},
		"a user's name": {"", "git",
			`file.owner "git" is not a user ID: use the number of the user that the container runs as, such as 1000`},
		"negative":         {"", "-1", `file.owner "-1" is not a user ID`},
		"with a plus":      {"", "+1", `file.owner "+1" is not a user ID`},
		"2^31":             {"", "2147483648", `file.owner "2147483648" is not a user ID`},
		"2^32-1":           {"", "4294967295", `file.owner "4294967295" is not a user ID`},
		"2^64":             {"", "18446744073709551616", `is not a user ID`},
		"user and group":   {"", "1000:1000", `file.owner "1000:1000" is not a user ID`},
		"fraction":         {"", "1e3", `file.owner "1e3" is not a user ID`},
		"octal":            {"", "0600", `file.owner "0600" is not a user ID`},
		"hexadecimal":      {"", "0x10", `file.owner "0x10" is not a user ID`},
		"space in front":   {"", " 1000", `file.owner " 1000" is not a user ID`},
		"space at the end": {"", "1000 ", `file.owner "1000 " is not a user ID`},
		"blank":            {"", " ", `file.owner " " is not a user ID`},
		"long":             {"", strings.Repeat("1", 30000), `is not a user ID`},
	}) {
		t.Run(what, func(t *testing.T) {
			v := n.volume()
			v.t = t
			v.ask(belonging{mode: c.mode, owner: c.owner})
			v.mustRefuse(codes.InvalidArgument, c.words)
		})
	}
	v := n.volume(attrs{"file.Mode": "0600"})
	v.mustRefuse(codes.InvalidArgument, `known are configuration.names, `)
	if n.api.count("") > 0 {
		t.Error("the API server was asked for one of them")
	}
}

// A driver whose user namespace does not have the owner or the group says so, and leaves nothing, or what was there.
func TestOwnerThatTheNodeDoesNotHave(t *testing.T) {
	t.Parallel()
	const missing = "2147483647"
	if usersHere(t) > 1<<31 {
		runInSmallNamespace(t, `exec "$@"`)
		return
	}
	n := newNode(t)
	n.startProcess()
	for _, b := range []belonging{{"", missing, ""}, {"0600", missing, "0"}, {"", "", missing}} {
		v := n.volume()
		v.ask(b)
		v.mustRefuse(codes.FailedPrecondition, fmt.Sprintf("the driver's user namespace has no user %d or no group %d: "+
			"use a file.owner and an fsGroup that the node has", b.access().uid, b.access().gid))
		v.ask(belonging{})
		v.settle()
		wantUnchanged := v.unchangedFromNow()
		v.ask(b)
		wantError(t, v.publish(), codes.FailedPrecondition, "has no user")
		wantUnchanged()
		v.wantBelongs(belonging{})
		v.wantClean()
		v.mustUnpublish()
	}
}
