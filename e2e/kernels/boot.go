package kernels

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"connectors-csi/e2e/machine"
)

// emulators are qemu for each processor.
var emulators = map[string]struct {
	command, debian string // its name, and that of Debian's package
	options         []string
	console         string // as the kernel names it
}{
	"amd64": {"qemu-system-x86_64", "qemu-system-x86", []string{"-machine", "q35", "-cpu", "max"}, "ttyS0"},
	"arm64": {"qemu-system-aarch64", "qemu-system-arm", []string{"-machine", "virt", "-cpu", "neoverse-n1"}, "ttyAMA0"},
}

// run boots the kernel, shows which tests have ended, and returns all that was on the console, also where it fails, and
// how long it took. The console goes into the file as well.
func (b boot) run(ctx context.Context, tests []string, limit time.Duration, file io.Writer) (console string, took time.Duration, _ error) {
	work, err := os.MkdirTemp("", "connectors-csi-kernels-")
	if err != nil {
		return "", 0, err
	}
	defer os.RemoveAll(work)
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd, err := b.machine(limited, work, tests)
	if err != nil {
		return "", 0, err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return "", 0, err
	}
	runtime.LockOSThread() // its end would be taken for the end of this process
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return "", 0, err
	}
	console = show(io.TeeReader(stdout, file))
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil:
		err = errors.New("interrupted")
	case limited.Err() != nil:
		err = fmt.Errorf("it hangs: it has not ended within %v", limit)
	case err != nil:
		err = fmt.Errorf("%v: %w\n%s", cmd, err, stderr.String())
	}
	return console, time.Since(began), err
}

// machine returns the command that is the machine, with the kernel and what it has in memory, which is made in the
// directory.
func (b boot) machine(ctx context.Context, work string, tests []string) (*exec.Cmd, error) {
	qemu := emulators[b.arch]
	if err := machine.Install([]machine.Need{{qemu.command, qemu.debian, machine.HasCommand(qemu.command)}}); err != nil {
		return nil, err
	}
	vmlinuz, busybox, err := b.fetch()
	if err != nil {
		return nil, err
	}
	initrd := filepath.Join(work, "initramfs")
	if err := b.makeInitramfs(initrd, busybox, tests); err != nil {
		return nil, err
	}
	// A kernel that panics says so on the console, and restarts, which ends qemu.
	parameters := "console=" + qemu.console + " quiet loglevel=1 oops=panic panic=-1 " + b.parameter
	return exec.CommandContext(ctx, qemu.command, append(qemu.options, "-accel", "tcg,thread=multi", "-smp", "2", "-m", "2048",
		"-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", vmlinuz, "-initrd", initrd,
		"-append", parameters)...), nil
}

// escapes are those by which firmware clears a screen.
var escapes = regexp.MustCompile(`\x1b(\[[0-9;?]*[A-Za-z]|c)`)

// show reads a console to its end, and prints which tests have ended.
func show(console io.Reader) string {
	var all strings.Builder
	for lines := bufio.NewReader(console); ; {
		line, err := lines.ReadString('\n')
		line = escapes.ReplaceAllString(strings.TrimRight(line, "\r\n"), "")
		all.WriteString(line + "\n")
		if strings.HasPrefix(line, "--- ") || strings.HasPrefix(line, "kernels: ") {
			fmt.Println(" ", line)
		}
		if err != nil {
			return all.String()
		}
	}
}

// outcome is what came of a boot.
type outcome struct {
	release  string // in full
	passed   int    // tests
	lacked   string // by renderers
	noswap   bool   // keeps a volume's files out of swap space
	charges  string // of the kernel for a volume of 256 empty files, and what the driver counts
	took     time.Duration
	problems []string
}

var (
	kernelPanicked = regexp.MustCompile(`Kernel panic - not syncing: .*`)
	driverEnded    = regexp.MustCompile(`(?ms)^kernels: Linux (\S+)\n(.*)^kernels: the driver ended with (\d+)$`)
	testsEnded     = regexp.MustCompile(`(?m)^kernels: the tests ended with (\d+)$`)
	testEnded      = regexp.MustCompile(`(?m)^--- (PASS|FAIL|SKIP): (\w+) `)

	// What tests log.
	logLacked  = regexp.MustCompile(`_test\.go:\d+: renderers lack "(.*)"\n`)
	logOptions = regexp.MustCompile(`_test\.go:\d+: the tmpfs has the options (\S+)\n`)
	logCharges = regexp.MustCompile(`_test\.go:\d+: (\d+) KiB are charged for a volume, and (\d+ KiB) counted\n`)
)

// judge finds out from a console whether everything was as it is to be, with these tests, or with all if there are none.
func (b boot) judge(console string, tests []string) (o outcome) {
	problem := func(format string, a ...any) { o.problems = append(o.problems, fmt.Sprintf(format, a...)) }
	if panicked := kernelPanicked.FindString(console); panicked != "" {
		problem("the kernel panicked: %s", panicked)
	}
	says := "connectors-csi: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set"
	if b.refuses {
		says = "connectors-csi: this kernel is too old: Linux 5.12 or later is needed"
	}
	driver := driverEnded.FindStringSubmatch(console)
	if driver == nil {
		problem("the driver was not started, or has not ended")
		return o
	}
	o.release = driver[1]
	if !strings.HasPrefix(driver[2], says) || strings.Count(driver[2], "\n") != 1 || driver[3] != "1" {
		problem("the driver has not said %q alone and ended with 1, but said %q and ended with %s", says, driver[2], driver[3])
	}
	if b.refuses {
		return o
	}

	results := map[string]string{}
	for _, match := range testEnded.FindAllStringSubmatch(console, -1) {
		results[match[2]] = match[1]
		switch match[1] {
		case "PASS":
			o.passed++
		case "FAIL":
			problem("%s failed", match[2])
		}
	}
	for _, test := range tests {
		switch results[test] {
		case "":
			problem("%s was not run, or has not ended", test)
		case "SKIP":
			problem("%s was skipped", test)
		}
	}
	if ended := testsEnded.FindStringSubmatch(console); ended == nil {
		problem("the tests have not ended")
	} else if ended[1] != "0" && len(o.problems) == 0 {
		problem("the tests ended with %s", ended[1])
	}

	logged := func(text *regexp.Regexp) string {
		if match := text.FindStringSubmatch(console); match != nil {
			return strings.Join(match[1:], " of ")
		}
		problem("no test has logged %q", text)
		return ""
	}
	o.charges = logged(logCharges)
	if o.lacked = logged(logLacked); o.lacked != b.lacks {
		problem("renderers lack %q, and not %q", o.lacked, b.lacks)
	}
	options := logged(logOptions)
	if o.noswap = slices.Contains(strings.Split(options, ","), "noswap"); o.noswap != b.noswap {
		problem("a volume's tmpfs has the options %s", options)
	}
	return o
}
