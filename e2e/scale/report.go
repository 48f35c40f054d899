package scale

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// report is what the command scale has found.
type report struct {
	Runs    []figures       `json:"runs"`
	Polling *pollingFigures `json:"polling"` // with the last run's drivers, without the right to watch
}

type figures struct {
	Drivers       int            `json:"drivers"`
	Volumes       int            `json:"volumes"`
	Streams       int            `json:"streams"`
	Publish       latencies      `json:"publish"`
	PublishErrors int            `json:"publishErrors"`
	Rest          restFigures    `json:"nothingChanges"`
	Connector     changeFigures  `json:"connectorChanges"`
	Class         changeFigures  `json:"classChanges"`
	Restart       restartFigures `json:"serverRestarts"`
	Rolling       rollingFigures `json:"rollingRestart"`
	Driver        footprint      `json:"driver"` // the highest of all drivers
}

type pollingFigures struct {
	Drivers int           `json:"drivers"`
	Volumes int           `json:"volumes"`
	Rest    restFigures   `json:"nothingChanges"`
	Class   changeFigures `json:"classChanges"`
}

type restFigures struct {
	Seconds                   float64  `json:"seconds"`
	Requests                  requests `json:"requests"`
	SeenByServer              requests `json:"requestsSeenByServer"`
	PerVolumeHour             float64  `json:"requestsPerVolumeHour"`
	DriverCPUPercent          float64  `json:"driverCPUPercent"`
	ServerCPUPercentPerStream float64  `json:"serverCPUPercentPerStream"`
	ServerKiBPerStream        float64  `json:"serverKiBPerStream"`

	serverMemory float64
}

type changeFigures struct {
	latencies
	Requests          requests `json:"requests"`
	RequestsPerChange float64  `json:"requestsPerChange"`
}

type restartFigures struct {
	ReadySeconds   float64 `json:"readySeconds"`
	StreamsSeconds float64 `json:"streamsSeconds"`
	PeakPerSecond  float64 `json:"peakRequestsPerSecond"`
}

type rollingFigures struct {
	latencies
	Seconds          float64  `json:"seconds"`
	Requests         requests `json:"requests"`
	DriverCPUSeconds float64  `json:"driverCPUSeconds"`
	ServerCPUSeconds float64  `json:"serverCPUSeconds"`
}

// latencies are in seconds.
type latencies struct {
	Count int     `json:"count"`
	P50   float64 `json:"p50Seconds"`
	P99   float64 `json:"p99Seconds"`
	Max   float64 `json:"maxSeconds"`
}

func latenciesOf(took []time.Duration) latencies {
	slices.Sort(took)
	at := func(percent int) float64 { return took[(len(took)-1)*percent/100].Seconds() }
	return latencies{len(took), at(50), at(99), at(100)}
}

func (l latencies) String() string {
	return fmt.Sprintf("p50 %.3f, p99 %.3f, max %.3f s", l.P50, l.P99, l.Max)
}

// write prints the table, and writes the files that the flags name.
func (r report) write(o Options) error {
	fmt.Print("\n", r.table(), "\n")
	if o.json != "" {
		text, err := json.MarshalIndent(r, "", "  ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(o.json, append(text, '\n'), 0o644); err != nil {
			return err
		}
	}
	if o.chart != "" {
		return r.draw(o.chart)
	}
	return nil
}

// table is in Markdown.
func (r report) table() string {
	var b strings.Builder
	row := func(name string, cell func(f figures) string, polled string) {
		fmt.Fprintf(&b, "| %s |", name)
		for _, f := range r.Runs {
			fmt.Fprintf(&b, " %s |", cell(f))
		}
		fmt.Fprintf(&b, " %s |\n", polled)
	}
	row("drivers × volumes", func(f figures) string { return fmt.Sprintf("%d × %d", f.Drivers, f.Volumes/f.Drivers) },
		fmt.Sprintf("%d × %d, polling", r.Polling.Drivers, r.Polling.Volumes/r.Polling.Drivers))
	b.WriteString("|" + strings.Repeat("---|", len(r.Runs)+2) + "\n")
	row("publish of all volumes at once", func(f figures) string {
		return fmt.Sprintf("%v; %d errors", f.Publish, f.PublishErrors)
	}, "")
	row("nothing changes: requests per volume-hour", func(f figures) string { return f.Rest.String() }, r.Polling.Rest.String())
	row("– with the streams that are opened again each 25 to 30 minutes (calculated)", func(f figures) string {
		return fmt.Sprintf("%.2f", f.Rest.PerVolumeHour+float64(f.Streams)*streamsPerHour/float64(f.Volumes))
	}, "")
	row("– CPU of a driver", func(f figures) string { return fmt.Sprintf("%.2f %%", f.Rest.DriverCPUPercent) },
		fmt.Sprintf("%.2f %%", r.Polling.Rest.DriverCPUPercent))
	row("– CPU and memory of the API server per watch", func(f figures) string {
		return fmt.Sprintf("%.4f %%, %.0f KiB (%d watches)", f.Rest.ServerCPUPercentPerStream, f.Rest.ServerKiBPerStream, f.Streams)
	}, "")
	row("one Connector changes: change → file", func(f figures) string { return f.Connector.String() }, "")
	row("a class that all volumes use changes: change → file", func(f figures) string { return f.Class.String() }, r.Polling.Class.String())
	row("the API server restarts", func(f figures) string {
		return fmt.Sprintf("ready after %.1f s, all streams are back after %.1f s; at most %.0f requests/s",
			f.Restart.ReadySeconds, f.Restart.StreamsSeconds, f.Restart.PeakPerSecond)
	}, "")
	row("a rolling restart of all drivers", func(f figures) string {
		return fmt.Sprintf("%.0f requests; CPU: %.2f s of a driver, %.1f s of the API server in %.0f s; change → file: %v",
			f.Rolling.Requests.total(), f.Rolling.DriverCPUSeconds, f.Rolling.ServerCPUSeconds, f.Rolling.Seconds, f.Rolling.latencies)
	}, "")
	row("each driver", func(f figures) string { return f.Driver.String() }, "")
	return b.String()
}

func (r restFigures) String() string { return fmt.Sprintf("%.2f (%v)", r.PerVolumeHour, r.Requests) }

func (c changeFigures) String() string {
	return fmt.Sprintf("%v; %.0f requests", c.latencies, c.RequestsPerChange)
}

// draw draws change → file and the requests, each over the number of drivers and beside polling.
func (r report) draw(path string) error {
	latency, cost := plot.New(), plot.New()
	latency.Title.Text, latency.Y.Label.Text = "A class changes: change → file", "seconds"
	cost.Title.Text, cost.Y.Label.Text = "Nothing changes", "requests per volume-hour"
	polled := r.Polling
	at := func(y func(f figures) float64) (points plotter.XYs) {
		for _, f := range r.Runs {
			points = append(points, plotter.XY{X: float64(f.Drivers), Y: y(f)})
		}
		return points
	}
	constant := func(y float64) plotter.XYs { return at(func(figures) float64 { return y }) }
	var numbers, powersOfTen plot.ConstantTicks
	for _, f := range r.Runs {
		numbers = append(numbers, plot.Tick{Value: float64(f.Drivers), Label: fmt.Sprint(f.Drivers)})
	}
	for _, value := range []float64{.01, .1, 1, 10, 100, 1000} {
		powersOfTen = append(powersOfTen, plot.Tick{Value: value, Label: fmt.Sprint(value)})
	}
	for _, p := range []*plot.Plot{latency, cost} {
		p.X.Label.Text = "drivers"
		p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
		p.X.Tick.Marker, p.Y.Tick.Marker = numbers, powersOfTen
		p.Legend.Top, p.Legend.Left = true, true
	}
	watched := func(f figures) float64 {
		return f.Rest.PerVolumeHour + float64(f.Streams)*streamsPerHour/float64(f.Volumes)
	}
	if err := plotutil.AddLinePoints(latency,
		"watching, p50", at(func(f figures) float64 { return f.Class.P50 }),
		"watching, p99", at(func(f figures) float64 { return f.Class.P99 }),
		"polling, p50", constant(polled.Class.P50), "polling, p99", constant(polled.Class.P99)); err != nil {
		return err
	}
	if err := plotutil.AddLinePoints(cost, "watching", at(watched), "polling", constant(polled.Rest.PerVolumeHour)); err != nil {
		return err
	}
	for _, p := range []*plot.Plot{latency, cost} {
		p.Y.Min, p.Y.Max = p.Y.Min/2, 20*p.Y.Max // room for the legend
	}
	canvas := vgsvg.New(24*vg.Centimeter, 10*vg.Centimeter)
	tiles := draw.Tiles{Rows: 1, Cols: 2, PadX: vg.Centimeter, PadRight: vg.Centimeter / 2}
	for i, c := range plot.Align([][]*plot.Plot{{latency, cost}}, tiles, draw.New(canvas))[0] {
		[]*plot.Plot{latency, cost}[i].Draw(c)
	}
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = canvas.WriteTo(file)
	return err
}
