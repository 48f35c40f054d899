package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/machine"
)

// The node's cgroups are not part of a namespace: nothing removes them but us. Their common parent has
// the name of the node's directory, which begins with prefix and the command's process id.
const cgroupRoot = "/sys/fs/cgroup"

// cgroupHierarchies returns where cgroups are made: one place with cgroup v2, one for each controller
// with v1.
func cgroupHierarchies() ([]string, error) {
	v2, err := IsCgroup2()
	if err != nil {
		return nil, err
	}
	if v2 {
		return []string{cgroupRoot}, nil
	}
	return filepath.Glob(cgroupRoot + "/*")
}

// IsCgroup2 reports whether the machine has cgroup v2.
func IsCgroup2() (bool, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(cgroupRoot, &fs); err != nil {
		return false, fmt.Errorf("%s: %w", cgroupRoot, err)
	}
	return fs.Type == unix.CGROUP2_SUPER_MAGIC, nil
}

// createCgroups makes the parent of all the node's cgroups, which kubelet expects to find.
func createCgroups(name string) error {
	hierarchies, err := cgroupHierarchies()
	if err != nil {
		return err
	}
	for _, hierarchy := range hierarchies {
		// With v1 some hierarchies are links to others ("cpu" to "cpu,cpuacct").
		if err := os.Mkdir(filepath.Join(hierarchy, name), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// enableControllers lets the children of cgroup v2's root use the controllers that kubelet insists on, as far
// as the kernel has them. The command calls it: from the node's PID namespace the processes that it may have
// to move cannot be seen.
func enableControllers() error {
	if v2, err := IsCgroup2(); err != nil || !v2 {
		return err
	}
	available, err := os.ReadFile(cgroupRoot + "/cgroup.controllers")
	if err != nil {
		return err
	}
	// memory is first: the kernel accepts cpu, cpuset and pids in a cgroup with processes too, but then refuses
	// memory with EOPNOTSUPP rather than EBUSY.
	for _, controller := range []string{"memory", "hugetlb", "cpu", "cpuset", "pids"} {
		if !slices.Contains(strings.Fields(string(available)), controller) {
			continue
		}
		enable := func() error {
			return os.WriteFile(cgroupRoot+"/cgroup.subtree_control", []byte("+"+controller), 0)
		}
		err := enable()
		if errors.Is(err, unix.EBUSY) {
			if err = moveProcessesToLeaf(); err == nil {
				err = enable()
			}
		}
		if err != nil {
			return fmt.Errorf("enable the cgroup controller %s: %w", controller, err)
		}
	}
	return nil
}

// moveProcessesToLeaf moves the root's processes into a child. Inside a container the root that we see is a
// cgroup like any other, and such a one has either processes or children with controllers.
func moveProcessesToLeaf() error {
	leaf := cgroupRoot + "/" + machine.Prefix + "container"
	if err := os.Mkdir(leaf, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	processes, err := os.ReadFile(cgroupRoot + "/cgroup.procs")
	if err != nil {
		return err
	}
	for pid := range strings.FieldsSeq(string(processes)) {
		// A process that has ended meanwhile needs no move.
		if err := os.WriteFile(leaf+"/cgroup.procs", []byte(pid), 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}

// removeCgroups removes a node's cgroups, children first. The kernel needs a moment after the last process
// of a cgroup has ended.
func removeCgroups(name string) {
	hierarchies, _ := cgroupHierarchies()
	for _, hierarchy := range hierarchies {
		var dirs []string
		filepath.WalkDir(filepath.Join(hierarchy, name), func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		for _, dir := range slices.Backward(dirs) {
			err := cluster.Await(5*time.Second, func() error {
				if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
				return nil
			})
			if err != nil {
				fmt.Fprintln(os.Stderr, "e2e: a cgroup is left:", err)
			}
		}
	}
}

// removeStaleCgroups removes what nodes have left whose command and init were both killed.
func removeStaleCgroups() {
	hierarchies, _ := cgroupHierarchies()
	for _, hierarchy := range hierarchies {
		stale, _ := filepath.Glob(filepath.Join(hierarchy, machine.Prefix+"*"))
		for _, dir := range stale {
			var pid int
			if n, _ := fmt.Sscanf(filepath.Base(dir), machine.Prefix+"%d-", &pid); n == 1 && unix.Kill(pid, 0) == unix.ESRCH {
				removeCgroups(filepath.Base(dir))
			}
		}
	}
}

// CgroupValue returns the first number in a file of a container's cgroup: one below a controller's hierarchy with
// cgroup v1, or one of v2.
func (n *Node) CgroupValue(id, v1, v2 string) (int64, error) {
	root, file := filepath.Join(cgroupRoot, filepath.Dir(v1)), filepath.Base(v1)
	if isV2, err := IsCgroup2(); err != nil {
		return 0, err
	} else if isV2 {
		root, file = cgroupRoot, v2
	}
	paths, _ := filepath.Glob(filepath.Join(root, filepath.Base(n.Dir), "kubepods/*/*", id, file))
	if len(paths) != 1 {
		return 0, fmt.Errorf("the cgroup of container %s: %q", id, paths)
	}
	content, err := os.ReadFile(paths[0])
	if err != nil {
		return 0, err
	}
	number := regexp.MustCompile(`\d+`).FindString(string(content)) // "123", or "usage_usec 123" and more
	return strconv.ParseInt(number, 10, 64)
}
