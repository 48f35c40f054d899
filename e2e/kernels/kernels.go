// Package kernels tries the driver on the kernels of its users. Debian's kernels boot in qemu, which emulates the
// processor, with nothing but the driver, its tests and a shell in memory.
package kernels

import (
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// boot is a kernel, how it is started, and what is to come of it.
type boot struct {
	release, arch string
	suites        []string // of Debian, which have the kernel and busybox
	debian        string   // how the name of its package begins
	parameter     string   // of the kernel
	refuses       bool     // says that the driver does not start there
	noswap        bool     // says that a volume's files are kept out of swap space
	lacks         string   // what renderers lack
	without       []string // the named tests that need what the parameter takes away
}

// boots are all that are tried. Linux 5.12 and 5.13, the oldest that the driver runs on, no release of Debian has.
var boots = []boot{
	{release: "5.10", arch: "amd64", suites: []string{"bullseye"}, debian: "linux-image", refuses: true},
	{release: "6.1", arch: "amd64", suites: []string{"bookworm"}, debian: "linux-image"},
	{release: "6.12", arch: "amd64", suites: []string{"trixie"}, debian: "linux-image", noswap: true},
	{release: "7.3", arch: "amd64", suites: []string{"trixie", "trixie-backports"}, debian: "linux-binary", noswap: true},
	{release: "6.12", arch: "arm64", suites: []string{"trixie"}, debian: "linux-image", noswap: true},
	{release: "6.12", arch: "amd64", suites: []string{"trixie"}, debian: "linux-image", noswap: true, parameter: "sysctl.user.max_user_namespaces=0",
		lacks: "a user namespace, and a limit of processes", without: []string{"TestOwnersCannotWrite", "TestWithoutNamespaces"}},
}

// named are the tests of what the driver and the kernel do together.
var named = []string{
	// publish
	"TestPublishMountsTheDocumentedExample", "TestMountIsReadOnly", "TestPublishTwiceIsOneMount", "TestFullVolume",
	// update under readers
	"TestChangesReachRunningContainers", "TestReadersDuringUpdates", "TestUpdatesKeepModeAndOwner",
	// unpublish
	"TestUnpublish", "TestForeignMountIsLeftAlone",
	// a driver that is killed
	"TestKilledBeforeTheMount", "TestKilledDuringUpdates", "TestRestartKeepsVolumes",
	// budgets
	"TestMemoryIsKnownBeforeTheMount", "TestMemoryIsWhatTheKernelCharges", "TestNodesBudget", "TestOldFilesThatAreOpenCount",
	// fsGroup and owner
	"TestModes", "TestRestartKeepsModeAndOwner", "TestOwnersCannotWrite",
	// confinement and limits of renderers
	"TestRendererIsConfined", "TestRendererCanDoNothing", "TestRenderersEndWithTheDriver", "TestWithoutNamespaces",
	"TestOutputLimit", "TestKnownLimitIsNotTriedAgain",
	// capabilities
	"TestDriverGivesUpCapabilities",
	// watch and push
	"TestChangesArePushed", "TestKilledDuringPushes", "TestUnmountedBySomebodyElse",
}

// Run is the command kernels.
func Run(arguments []string) error {
	flags := flag.NewFlagSet("kernels", flag.ExitOnError)
	release := flags.String("kernel", "", "the release of Linux to try, such as 6.1; default: all")
	arch := flags.String("arch", "", "the processor to try, amd64 or arm64; default: both")
	allTests := flags.Bool("all-tests", false, "run all tests of the driver, which takes an hour, and not only the named ones; "+
		"some fail that need a processor as fast as a real one")
	flags.Parse(arguments)
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if err := checkNames(".."); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var table strings.Builder
	rows := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(rows, "kernel\tprocessor\tparameter\ttests passed\tseconds\trenderers lack\tnoswap\tcharged of counted")
	tried, failed := 0, 0
	for _, b := range boots {
		if ctx.Err() != nil {
			break
		}
		if cmp.Or(*release, b.release) != b.release || cmp.Or(*arch, b.arch) != b.arch {
			continue
		}
		tried++
		o := b.try(ctx, *allTests)
		fmt.Fprintln(rows, b.row(o))
		if len(o.problems) > 0 {
			failed++
		}
	}
	if tried == 0 {
		return fmt.Errorf("no such kernel; there are %q", boots)
	}
	rows.Flush()
	fmt.Printf("\n%s", table.String())
	if failed > 0 {
		return fmt.Errorf("%d of %d boots failed", failed, tried)
	}
	return nil
}

// checkNames makes sure that each named test is one of the driver's, whose sources are in the directory.
func checkNames(dir string) error {
	paths, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		return err
	}
	var sources []byte
	for _, path := range paths {
		source, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		sources = append(sources, source...)
	}
	unknown := slices.DeleteFunc(slices.Clone(named), func(test string) bool {
		return bytes.Contains(sources, []byte("\nfunc "+test+"(t *testing.T) {\n"))
	})
	if len(unknown) > 0 {
		return fmt.Errorf("e2e/kernels names tests that the driver does not have: %s", strings.Join(unknown, ", "))
	}
	return nil
}

// shown is how much of the end of a console is shown where something has failed.
const shown = 8 << 10

// try boots the kernel, runs the tests, and shows what is wrong.
func (b boot) try(ctx context.Context, allTests bool) outcome {
	log, err := os.CreateTemp("", "connectors-csi-kernels-"+b.release+"-"+b.arch+"-*.log")
	if err != nil {
		return outcome{problems: []string{err.Error()}}
	}
	defer log.Close()
	fmt.Printf("\n%v: fetching and building what it runs, then booting\n", b)
	tests, limit := b.tests(), 15*time.Minute
	if allTests && b.without == nil {
		tests, limit = nil, 3*time.Hour
	}
	console, took, err := b.run(ctx, tests, limit, log)
	o := b.judge(console, tests)
	if err != nil {
		o.problems = append([]string{err.Error()}, o.problems...)
	}
	o.took = took
	if len(o.problems) == 0 {
		os.Remove(log.Name())
		return o
	}
	fmt.Printf("The end of the console, of which all is in %s:\n%s\n", log.Name(), console[max(0, len(console)-shown):])
	for _, problem := range o.problems {
		fmt.Printf("FAILED: %v: %s\n", b, problem)
	}
	return o
}

// tests are those of the names that the boot runs.
func (b boot) tests() []string {
	return slices.DeleteFunc(slices.Clone(named), func(test string) bool { return slices.Contains(b.without, test) })
}

func (b boot) String() string {
	return strings.TrimSpace(b.release + " " + b.arch + " " + b.parameter)
}

// row is what the table has of a boot.
func (b boot) row(o outcome) string {
	passed, lacks, noswap := fmt.Sprint(o.passed), cmp.Or(o.lacked, "nothing"), "no"
	if o.noswap {
		noswap = "yes"
	}
	if b.refuses {
		passed, lacks, noswap = "the driver refuses to start", "", ""
	}
	if len(o.problems) > 0 {
		passed += ", FAILED"
	}
	return strings.Join([]string{cmp.Or(o.release, b.release), b.arch, b.parameter, passed,
		fmt.Sprintf("%.0f", o.took.Seconds()), lacks, noswap, o.charges}, "\t")
}
