package main

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// A volume is one tmpfs, mounted read-only at its target path. Its files are laid out as kubelet lays out a
// ConfigMap, so that a change of several files is one rename and file watchers behave as they do there:
//
//	name           -> ..data/name         what users see, one link for each file
//	..data         -> ..gen-<digest>      the current generation
//	..gen-<digest>/name                   the files; the digest is one of them and of who may read them
//
// The mounts are the only state that outlives the process: a restarted driver goes on from what it finds in
// them, and from kubelet's next calls.
const (
	mountSource = driverName // what /proc/mounts shows as the device

	maxVolumeBytes = 1 << 20 // all files of a volume together, as for a ConfigMap
	maxVolumeFiles = 256

	maxPodVolumes = 16
	maxPodMemory  = 2 << 20 // of all volumes of a Pod together, as the kernel charges it

	// What the kernel charges beside the pages. Measured with a memory cgroup: 5 to 17 KiB and 1.0 to 1.5
	// KiB.
	mountMemory = 20 << 10
	inodeMemory = 1536 // of a file, a link or a directory; the longer its name, the more

	targetPattern = "*/volumes/kubernetes.io~csi/*/mount" // of target paths, below kubelet's pods directory

	dataLink         = "..data"
	nextDataLink     = "..data_tmp"
	generationPrefix = "..gen-"
)

// errNotOurs is returned for a target path that holds something this driver did not put there.
var errNotOurs = errors.New("the target path holds something that connectors-csi did not mount")

// files are the contents of a volume by file name.
type files map[string][]byte

// writing is held, shared, while a new volume's files are written, and alone while a child process is
// started: until that executes its program, it has copies of all descriptors, and a mount that has a writer
// cannot be made read-only.
var writing sync.RWMutex

// permissions says who may read a volume.
type permissions struct {
	uid, gid int
	mode     os.FileMode // of files
}

// dirMode is the mode of directories: whoever may read the files may list and search them, and nobody may
// write.
func (p permissions) dirMode() os.FileMode {
	read := p.mode & 0o444
	return read | read>>2
}

// mountState is what there is at a target path.
type mountState struct {
	mounted  bool      // something is, at the path itself
	complete bool      // and ..data leads somewhere: it is a volume with its files, and no new one
	id       unix.Fsid // of the file system; that of a tmpfs is random
	used     int64     // the memory that it takes, if it is a tmpfs
}

// look finds out what there is at the target path, without the mount table, whose length depends on others.
func look(target string) (at mountState, _ error) {
	var stat unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, target, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_MODE, &stat)
	switch {
	case errors.Is(err, unix.ENOENT):
		return at, nil
	case err != nil:
		return at, &fs.PathError{Op: "statx", Path: target, Err: err}
	case stat.Mode&unix.S_IFMT != unix.S_IFDIR:
		return at, fmt.Errorf("%s is not a directory: %w", target, errNotOurs)
	case stat.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0:
		return at, nil
	}
	var usage unix.Statfs_t
	if unix.Statfs(target, &usage) == nil {
		at = stateOf(&usage)
	}
	at.mounted, at.complete = true, unix.Access(target+"/"+dataLink, unix.F_OK) == nil
	return at, nil
}

// mountVolume mounts a new volume at the target path:
//
//  1. create a tmpfs that is attached nowhere
//  2. write all files into it
//  3. make the mount read-only
//  4. create the target directory and attach the mount there
//
// Until the last system call nobody sees anything, and after it everything; a process that dies in between
// leaves at most an empty directory.
func mountVolume(target string, f files, p permissions) (at mountState, err error) {
	// 1. create
	mount, err := newTmpfs()
	if err != nil {
		return at, err
	}
	defer unix.Close(mount)

	writing.RLock()
	_, err = writeGeneration(mount, f, p) // 2. write
	if err == nil {
		err = setReadOnly(mount, true) // 3. read-only
	}
	writing.RUnlock()
	if err != nil {
		return at, err
	}

	// 4. attach. Mkdir, not MkdirAll: kubelet creates the parent, so a missing one means that this
	// container does not see kubelet's directory, and a volume mounted here would never reach the Pod.
	if err := os.Mkdir(target, 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
		return at, err
	}
	if err := unix.MoveMount(mount, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		os.Remove(target)
		return at, fmt.Errorf("move_mount to %s: %w", target, err)
	}
	return stateBehind(mount), nil
}

// stateBehind returns the file system behind a mount, which may be a clone, or nothing if the kernel fails.
func stateBehind(mount int) (at mountState) {
	var usage unix.Statfs_t
	if unix.Fstatfs(mount, &usage) == nil {
		at = stateOf(&usage)
	}
	return at
}

// stateOf returns what the kernel says of a mounted file system.
func stateOf(usage *unix.Statfs_t) mountState {
	at := mountState{mounted: true, id: usage.Fsid}
	if usage.Type == unix.TMPFS_MAGIC {
		at.used = charge(int64(usage.Blocks-usage.Bfree)*int64(usage.Bsize), int64(usage.Files-usage.Ffree))
	}
	return at
}

// updateVolume brings the files of a mounted volume up to date without ever making the mount writable for
// the containers that use it: it writes through a private clone of the mount.
func updateVolume(target string, f files, p permissions) (at mountState, changed bool, err error) {
	at, err = throughClone(target, func(clone int) (err error) {
		changed, err = writeGeneration(clone, f, p)
		return err
	})
	return at, changed, err
}

// sweepVolume removes the generations that are not the current one.
func sweepVolume(target string) (at mountState, err error) {
	return throughClone(target, func(clone int) error {
		root, present, err := openVolume(clone)
		if err != nil {
			return err
		}
		defer root.Close()
		current, err := root.Readlink(dataLink)
		if err != nil {
			return err
		}
		return removeGenerations(root, present, current)
	})
}

// emptyVolume truncates and removes all that is in a volume, so that a descriptor that somebody has passed on
// keeps next to nothing of it. It does so only in the file system of that id, where every name is one that
// this driver gives. If something is left, as an old file that somebody has open, it returns a clone of the
// mount, which the caller closes, or else -1.
func emptyVolume(target string, id unix.Fsid) (pinned int) {
	pinned = -1
	throughClone(target, func(clone int) (err error) { // what fails leaves something
		if stateBehind(clone).id != id {
			return errNotOurs
		}
		empty(clone)
		if !stateBehind(clone).isEmpty() {
			pinned, err = unix.FcntlInt(uintptr(clone), unix.F_DUPFD_CLOEXEC, 0)
		}
		return err
	})
	return pinned
}

// isEmpty reports whether a tmpfs has nothing but its root directory.
func (at mountState) isEmpty() bool { return at.used <= charge(0, 1) }

// empty truncates and removes all files.
func empty(mount int) error {
	root, present, err := openVolume(mount)
	if err != nil {
		return err
	}
	defer root.Close()
	for name := range present {
		paths, _ := fs.Glob(root.FS(), name+"/*") // of a generation, also by ..data
		for _, file := range paths {
			if f, err := root.OpenFile(file, os.O_WRONLY|os.O_TRUNC, 0); err == nil {
				f.Close()
			}
		}
		if err := root.RemoveAll(name); err != nil {
			return err
		}
	}
	return nil
}

// openVolume opens the root directory behind a mount and reads the names in it. It refuses a directory with a
// name that no volume has: one that is no link and does not begin with two dots.
func openVolume(mount int) (_ *os.Root, present map[string]bool, _ error) {
	root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", mount))
	if err != nil {
		return nil, nil, err
	}
	entries, err := fs.ReadDir(root.FS(), ".")
	present = map[string]bool{}
	for _, e := range entries {
		present[e.Name()] = true
		if e.Type() != fs.ModeSymlink && !strings.HasPrefix(e.Name(), "..") {
			err = fmt.Errorf("%s: %w", e.Name(), errNotOurs)
		}
	}
	if err != nil {
		return nil, nil, errors.Join(err, root.Close())
	}
	return root, present, nil
}

// removeGenerations removes those of the names that are generations, except the current one.
func removeGenerations(root *os.Root, names map[string]bool, current string) error {
	for name := range names {
		if !strings.HasPrefix(name, generationPrefix) || name == current {
			continue
		}
		if err := root.RemoveAll(name); err != nil {
			return err
		}
	}
	return nil
}

// throughClone calls change with a writable clone of the mount, which nobody else sees, and returns what there is
// after it.
func throughClone(target string, change func(clone int) error) (at mountState, err error) {
	clone, err := unix.OpenTree(unix.AT_FDCWD, target,
		unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return at, fmt.Errorf("open_tree %s: %w", target, err)
	}
	defer unix.Close(clone)
	var stat unix.Statfs_t
	if err := unix.Fstatfs(clone, &stat); err != nil {
		return at, fmt.Errorf("fstatfs %s: %w", target, err)
	}
	if stat.Type != unix.TMPFS_MAGIC {
		return at, fmt.Errorf("%s: %w", target, errNotOurs)
	}
	if err := setReadOnly(clone, false); err != nil {
		return at, err
	}
	if err = change(clone); err != nil {
		err = fmt.Errorf("%s: %w", target, err)
	}
	return stateBehind(clone), err
}

// unmountVolume unmounts whatever is mounted at the target path and removes the directory. Nothing there,
// or nothing mounted, is success: kubelet may ask again, and it may ask after a reboot.
func unmountVolume(target string) (changed bool, err error) {
	for {
		// Detached, so that a process standing in the directory cannot keep the Pod from being deleted.
		// EINVAL: not a mount point.
		err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return changed, fmt.Errorf("umount %s: %w", target, err)
		}
		unmounted := err == nil
		changed = changed || unmounted
		switch err := unix.Rmdir(target); {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.ENOENT):
			return changed, nil
		case errors.Is(err, unix.EBUSY) && unmounted: // there was another mount below
		case errors.Is(err, unix.ENOTEMPTY), errors.Is(err, unix.ENOTDIR):
			return changed, fmt.Errorf("rmdir %s: %w", target, errNotOurs)
		default:
			return changed, fmt.Errorf("rmdir %s: %w", target, err)
		}
	}
}

// newTmpfs creates a tmpfs that is mounted nowhere, with room for two generations, each as large as all volumes
// of a Pod may be.
func newTmpfs() (mount int, err error) {
	options := [][2]string{
		{"source", mountSource},
		{"mode", "700"}, // until writeGeneration
		{"size", strconv.Itoa(2 * maxPodMemory)},
		{"nr_inodes", strconv.Itoa(2*2*maxVolumeFiles + 8)},
	}
	conf, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen tmpfs: %w", err)
	}
	defer unix.Close(conf)
	for _, o := range options {
		if err := unix.FsconfigSetString(conf, o[0], o[1]); err != nil {
			return -1, fmt.Errorf("tmpfs option %s=%s: %w", o[0], o[1], err)
		}
	}
	// Keeps tokens out of swap space. Linux before 6.4 and user namespaces refuse it with EINVAL.
	if err := unix.FsconfigSetFlag(conf, "noswap"); err != nil && !errors.Is(err, unix.EINVAL) {
		return -1, fmt.Errorf("tmpfs option noswap: %w", err)
	}
	if err := unix.FsconfigCreate(conf); err != nil {
		return -1, fmt.Errorf("create tmpfs: %w", err)
	}
	mount, err = unix.Fsmount(conf, unix.FSMOUNT_CLOEXEC,
		unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsmount tmpfs: %w", err)
	}
	return mount, nil
}

// setReadOnly changes the mount alone, not the file system: a clone of it may be the other way.
func setReadOnly(mount int, readOnly bool) error {
	attr := unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	if readOnly {
		attr = unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	}
	if err := unix.MountSetattr(mount, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("mount_setattr: %w", err)
	}
	return nil
}

// writeGeneration brings the volume behind the mount to the given files:
//
//  1. if ..data is not yet the wanted generation, remove all others but the current one, and write the wanted
//     one's directory anew
//  2. create the visible links that are missing; they dangle until ..data has their file
//  3. give the root directory to those who may read the files, and switch ..data to the generation, by rename
//  4. remove what belongs neither to it nor to the generation that was current until now: that one stays,
//     since somebody may be following ..data into it at this very moment
//
// Every step finds by itself what is left to do, so an interrupted update is completed by the next one. It
// reports whether it changed what users see; if not, and without an error, nothing is left to do.
func writeGeneration(mount int, f files, p permissions) (changed bool, err error) {
	root, present, err := openVolume(mount)
	if err != nil {
		return false, err
	}
	defer root.Close()
	generation := generationPrefix + digest(f, p)
	current, err := root.Readlink(dataLink)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}

	// 1. write
	if current != generation {
		if err := removeGenerations(root, present, current); err != nil {
			return false, err
		}
		if err := writeFiles(root, generation, f, p); err != nil {
			return false, errors.Join(err, root.RemoveAll(generation))
		}
	}

	// 2. link
	for name := range f {
		if !present[name] {
			changed = true
			if err := root.Symlink(dataLink+"/"+name, name); err != nil {
				return true, err
			}
		}
	}

	// 3. switch
	if current != generation {
		if err := switchTo(root, generation, p); err != nil {
			return changed, err
		}
		changed = true
	}

	// 4. tidy
	for name := range present {
		if _, wanted := f[name]; wanted || name == generation || name == current || name == dataLink {
			continue
		}
		if err := root.RemoveAll(name); err != nil {
			return changed, err
		}
	}
	return changed, nil
}

// switchTo makes a generation the current one, for those who may read its files.
func switchTo(root *os.Root, generation string, p permissions) error {
	if err := p.applyTo(root); err != nil {
		return err
	}
	if err := root.RemoveAll(nextDataLink); err != nil {
		return err
	}
	if err := root.Symlink(generation, nextDataLink); err != nil {
		return err
	}
	return root.Rename(nextDataLink, dataLink)
}

// writeFiles writes the directory of a generation. Modes are set after creation, since the umask would take
// from them.
func writeFiles(root *os.Root, generation string, f files, p permissions) error {
	if err := root.Mkdir(generation, 0o700); err != nil {
		return err
	}
	dir, err := root.OpenRoot(generation)
	if err != nil {
		return err
	}
	defer dir.Close()
	for name, content := range f {
		file, err := dir.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o400)
		if err != nil {
			return err
		}
		_, err = file.Write(content)
		if err := errors.Join(err, p.apply(file, p.mode), file.Close()); err != nil {
			return err
		}
	}
	return p.applyTo(dir)
}

// applyTo gives a directory to those who may read the volume. One that is theirs already stays untouched: while
// it changes it is root's, and somebody on the way through it would be refused.
func (p permissions) applyTo(dir *os.Root) error {
	self, err := dir.Open(".")
	if err != nil {
		return err
	}
	defer self.Close()
	var is unix.Stat_t
	if err := unix.Fstat(int(self.Fd()), &is); err != nil {
		return err
	}
	if int(is.Uid) == p.uid && int(is.Gid) == p.gid && os.FileMode(is.Mode&0o7777) == p.dirMode() {
		return nil
	}
	if err := self.Chown(0, 0); err != nil {
		return err
	}
	return p.apply(self, p.dirMode())
}

// apply sets the mode before the owner, since changing the mode of another user's file takes CAP_FOWNER.
func (p permissions) apply(file *os.File, mode os.FileMode) error {
	if err := file.Chmod(mode); err != nil {
		return err
	}
	err := file.Chown(p.uid, p.gid)
	if errors.Is(err, unix.EINVAL) {
		return failuref(codes.FailedPrecondition, "the driver's user namespace has no user %d or no group %d: "+
			"use a %s and an fsGroup that the node has", p.uid, p.gid, attrOwner)
	}
	return err
}

// digest names a generation: by its files and by who may read them, so that a change of either is a change.
func digest(f files, p permissions) string {
	h := sha256.New()
	fmt.Fprintf(h, "%v\n", p)
	for _, name := range slices.Sorted(maps.Keys(f)) {
		fmt.Fprintf(h, "%d:%s%d:%s", len(name), name, len(f[name]), f[name])
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// budget limits the memory of a Pod's volumes, and of all. A tmpfs belongs to the memory of the container that
// wrote it, and outlives its processes: volumes without a limit would kill the driver, and every driver after it.
type budget struct {
	limit int64 // of all volumes

	oneAtATime sync.Mutex // held by an update that may not keep the old files beside the new ones

	mu     sync.Mutex // guards what follows
	all    total
	pods   map[string]total   // by the Pod's uid
	pinned map[int]*footprint // of volumes that were unmounted and are not empty, by a clone of the mount
}

// total sums the footprints of several volumes.
type total struct {
	volumes     int
	files, used int64
}

// footprint is the memory of a volume. Whoever has the volume's turn may read it, and changes it with the lock of
// the budget. The methods of budget that have one are for whoever has the turn.
type footprint struct {
	pod   string    // uid
	id    unix.Fsid // of the tmpfs, if this driver mounted it
	files int64     // by its files alone, as far as that is known; 0 until it is mounted
	used  int64     // by all that is in it: also by old files that somebody has open, and by what is set aside
}

// newBudget makes the budget of a node, and returns by target path what another process of the driver has left
// mounted.
func newBudget(podsDir string, limit int64) (*budget, map[string]*footprint, error) {
	b := &budget{limit: limit, pods: map[string]total{}, pinned: map[int]*footprint{}}
	left := map[string]*footprint{}
	mounts, err := readMounts()
	for _, m := range mounts {
		// Kubelet mounts single files of a volume below the Pod's directory as well, for subPath.
		pod, isTarget := podOf(podsDir, m.point)
		if over := left[m.point]; over != nil { // something else is mounted over it
			over.id = unix.Fsid{}
		} else if isTarget && m.source == mountSource {
			at, err := look(m.point)
			if err != nil {
				continue
			}
			left[m.point] = &footprint{pod: pod, id: at.id}
			b.set(left[m.point], at.used, at.used)
		}
	}
	return b, left, err
}

// podOf returns the uid of the Pod that a path is a volume's target path of, if it is one.
func podOf(podsDir, target string) (uid string, isTarget bool) {
	below, ok := strings.CutPrefix(target, podsDir+"/")
	matches, _ := filepath.Match(targetPattern, below)
	uid, _, _ = strings.Cut(below, "/")
	return uid, ok && matches && filepath.Clean(target) == target
}

// publish makes the files visible, complete and read-only, at the target path: by a new mount, or in place
// where one is there already. Where the limits leave no room for the old files, these go at once. It reports
// whether that changed what users see. When it fails, a target that was not mounted before is not mounted
// afterwards, and one that was shows its old files, or the new ones if it was these that did not go.
func (b *budget) publish(target string, m *footprint, at mountState, f files,
	p permissions) (changed bool, err error) {
	need := f.charge()
	keepOld, err := b.reserve(m, at.used, need)
	if !keepOld { // nor with an error, which may come of what others keep for a moment
		b.oneAtATime.Lock()
		defer b.oneAtATime.Unlock()
		if m.files > 0 {
			if swept, err := sweepVolume(target); err == nil && swept.mounted {
				at.used = swept.used
			}
		}
		keepOld, err = b.reserve(m, at.used, need)
	}
	if err != nil {
		return false, err
	}
	id, used := m.id, at.used
	if at.mounted {
		at, changed, err = updateVolume(target, f, p)
	} else {
		at, err = mountVolume(target, f, p)
		changed, id = err == nil, at.id
	}
	if err == nil && !keepOld {
		at, err = sweepVolume(target)
	}
	if at.mounted {
		used = at.used
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	m.id = id
	switch {
	case err == nil:
		b.set(m, need, used)
	case m.files == 0: // it is not mounted, or not by us
		b.set(m, 0, 0)
	default:
		b.set(m, m.files, used)
	}
	return changed, err
}

// sweep is sweepVolume, and gives the memory back.
func (b *budget) sweep(target string, m *footprint) error {
	at, err := sweepVolume(target)
	b.mu.Lock()
	defer b.mu.Unlock()
	if at.mounted && m.files > 0 {
		b.set(m, m.files, at.used)
	}
	return err
}

// unpublish is unmountVolume, and gives the memory back, as far as nobody has it open:
//
//  1. empty the volume, if it is ours
//  2. unmount it
//  3. pin one that is not empty by a clone, which has the charge from now on, for checkPinned
func (b *budget) unpublish(target string, m *footprint) (changed bool, err error) {
	// 1. empty
	clone := -1
	if m.id != (unix.Fsid{}) {
		clone = emptyVolume(target, m.id)
	}

	// 2. unmount
	changed, err = unmountVolume(target)

	// 3. pin
	b.mu.Lock()
	defer b.mu.Unlock()
	if err == nil || clone >= 0 {
		b.set(m, 0, 0)
		m.id = unix.Fsid{}
	}
	if clone >= 0 {
		b.pinned[clone] = &footprint{pod: m.pod}
		b.set(b.pinned[clone], 0, stateBehind(clone).used)
	}
	return changed, err
}

// look is the function of that name, and notes the memory that the volume uses by now.
func (b *budget) look(target string, m *footprint) (mountState, error) {
	at, err := look(target)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err == nil && at.mounted && m.files > 0 {
		b.set(m, m.files, at.used)
	}
	return at, err
}

// forget gives the memory back of a volume that somebody else has unmounted.
func (b *budget) forget(m *footprint) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.set(m, 0, 0)
}

// checkPinned empties the unmounted volumes once more, and lets go of those that are empty by now.
func (b *budget) checkPinned() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for clone, m := range b.pinned {
		empty(clone)
		at := stateBehind(clone)
		if !at.isEmpty() {
			b.set(m, 0, at.used)
			continue
		}
		b.set(m, 0, 0)
		delete(b.pinned, clone)
		unix.Close(clone)
	}
}

// reserve sets memory aside for a volume that uses so much and whose files will need so much:
//
//  1. see what the Pod's volumes use, and all
//  2. refuse a volume that is new or grows, if that goes beyond a limit. One that does not grow needs no
//     room, so that the tokens of what is mounted go on; but a Pod with old files has to let go of them first,
//     if it is beyond its limit, or the node beyond its own
//  3. let the old files stay beside the new ones (keepOld), where the limits leave room for both
func (b *budget) reserve(m *footprint, used, need int64) (keepOld bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	refuse := func(format string, a ...any) (bool, error) {
		return false, failuref(codes.ResourceExhausted, format, a...)
	}

	// 1. see
	if used == 0 || m.files == 0 { // it is not mounted, or not by us
		b.set(m, 0, 0)
	} else {
		b.set(m, m.files, used)
	}
	pod, grows := b.pods[m.pod], max(need-m.files, 0)
	oldFiles := pod.used - pod.files
	keepOld = pod.used+need <= maxPodMemory && b.all.used+need <= b.limit

	// 2. refuse
	switch {
	case m.files == 0 && pod.volumes >= maxPodVolumes:
		return refuse("the Pod has %d other volumes of %s, and may have %d in all: mount several "+
			"configurations in one volume", pod.volumes, mountSource, maxPodVolumes)
	case grows > 0 && pod.used+grows > maxPodMemory:
		return refuse("the volume takes %d KiB of memory and the Pod's other volumes and old files take %d KiB, "+
			"but together they may take %d KiB: mount fewer or smaller files", need>>10,
			(pod.used-m.files)>>10, maxPodMemory>>10)
	case grows > 0 && b.all.used+grows > b.limit:
		return refuse("the volume takes %d KiB of memory and the node's other volumes and old files take %d KiB, "+
			"but together they may take %d KiB: raise --volumes-budget and the memory limit of the DaemonSet, "+
			"or use another node", need>>10, (b.all.used-m.files)>>10, b.limit>>10)
	case !keepOld && pod.used > max(pod.files, maxPodMemory):
		return refuse("the Pod's volumes take %d KiB of memory, %d KiB of it for old files that its "+
			"containers have open or mount by subPath, but may take %d KiB: restart the containers",
			pod.used>>10, oldFiles>>10, maxPodMemory>>10)
	case !keepOld && oldFiles > 0 && b.all.used > max(b.all.files, b.limit):
		return refuse("the node's volumes take %d KiB of memory, but may take %d KiB, and %d KiB of it are "+
			"for old files that containers of this Pod have open or mount by subPath: restart them",
			b.all.used>>10, b.limit>>10, oldFiles>>10)
	}

	// 3. keep
	room := grows
	if keepOld {
		room = need
	}
	b.set(m, m.files, m.used+room)
	return keepOld, nil
}

// set changes the footprint of a volume; one that uses nothing has no files and counts as none. The caller has
// the lock.
func (b *budget) set(m *footprint, files, used int64) {
	if used == 0 {
		files = 0
	}
	pod := b.pods[m.pod]
	for _, t := range []*total{&pod, &b.all} {
		if m.used > 0 {
			t.volumes--
		}
		if used > 0 {
			t.volumes++
		}
		t.files, t.used = t.files+files-m.files, t.used+used-m.used
	}
	m.files, m.used, b.pods[m.pod] = files, used, pod
	if pod.volumes == 0 {
		delete(b.pods, m.pod)
	}
}

// usage returns the number of mounted volumes, and the memory that all take, also those that are not mounted any
// more.
func (b *budget) usage() (count int, used int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all.volumes - len(b.pinned), b.all.used
}

// charge is what a volume that holds the files takes.
func (f files) charge() int64 {
	page := os.Getpagesize()
	pages := 0
	for name, content := range f {
		pages += (len(content) + page - 1) / page
		if len(dataLink+"/"+name) > 127 { // a shorter link needs no page
			pages++
		}
	}
	// a file and a link each; ..data, its directory and the root
	return charge(int64(pages*page), int64(len(f)*2+3))
}

// charge is what the kernel charges for a volume of so many bytes and inodes.
func charge(bytes, inodes int64) int64 { return mountMemory + bytes + inodes*inodeMemory }

// checkKernel creates and drops a volume that is never attached, for which it takes the newest system call of a
// publish, mount_setattr of Linux 5.12, and CAP_SYS_ADMIN.
func checkKernel() error {
	mount, err := newTmpfs()
	if err == nil {
		defer unix.Close(mount)
		err = setReadOnly(mount, true)
	}
	switch {
	case errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("this kernel is too old: Linux 5.12 or later is needed (%w)", err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("this process may not mount: the container must be privileged (%w)", err)
	}
	return err
}

// checkShared makes sure that what is mounted below the directory reaches the host, and so the Pods.
func checkShared(dir string) error {
	mounts, err := readMounts()
	if err != nil {
		return err
	}
	var around mountInfo // the innermost of the mounts that hold the directory
	for _, m := range mounts {
		if m.holds(dir) && len(m.point) >= len(around.point) {
			around = m
		}
	}
	if !around.shared {
		return fmt.Errorf("%s is not on a shared mount (it is on the one at %s), so no Pod would see its "+
			"volumes: mount kubelet's pods directory there with mountPropagation: Bidirectional, and set "+
			"--kubelet-dir to kubelet's --root-dir", dir, cmp.Or(around.point, "/"))
	}
	return nil
}

// mountInfo is what is needed of one line of the mount table.
type mountInfo struct {
	point, source string
	shared        bool
}

// holds reports whether the path is on the mount, or on one that is mounted within it.
func (m mountInfo) holds(path string) bool {
	return m.point == "/" || path == m.point || strings.HasPrefix(path, m.point+"/")
}

// readMounts reads the mounts of this process: proc_pid_mountinfo(5).
func readMounts() ([]mountInfo, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var mounts []mountInfo
	// White space in a path is written in octal.
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(string(text)) {
		before, after, _ := strings.Cut(line, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if len(left) < 6 || len(right) < 2 {
			return nil, fmt.Errorf("unexpected line in /proc/self/mountinfo: %q", line)
		}
		mounts = append(mounts, mountInfo{
			point:  unescape.Replace(left[4]),
			source: right[1],
			shared: slices.ContainsFunc(left[6:], func(s string) bool {
				return strings.HasPrefix(s, "shared:")
			}),
		})
	}
	return mounts, nil
}
