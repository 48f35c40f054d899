package tests

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectors-csi/e2e/cluster"
)

// refusesMalformedTokens sends what is no token, or has more in it than one. None of it may reach the API server.
func (p standardProxy) refusesMalformedTokens() {
	good := p.tokens["git-user"]
	raw := func(pair string) string {
		return "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(pair))
	}
	smuggled := "\r\nHost: x\r\n\r\nGET /api/v1/secrets HTTP/1.1\r\nAuthorization: Bearer " + good
	headers := []string{
		"Authorization:", "Authorization: Bearer", "Authorization: Bearer ", "Authorization: Basic",
		"Authorization: Basic ",
		"Authorization: " + good, "Authorization: Token " + good, "Authorization: Digest " + good,
		"Authorization: Bearer" + good,
		"Authorization: Bearer " + good + " x", "Authorization: Bearer " + good + ",x", "Authorization: Bearer \"" + good +
			"\"",
		"Authorization: Bearer " + good + "\x00", "Authorization: Bearer\t" + good, "Authorization: Bearer " + good + "\t",
		"Authorization: Bearer " + good + "%0d%0aX:1", "Authorization: Bearer é" + good, "Authorization: Bearer $token",
		"Authorization: Bearer <" + good + ">",
		"Authorization: Basic " + good, "Authorization: Basic !!!!", "Authorization: Basic " +
			base64.StdEncoding.EncodeToString([]byte(good)),
		raw(":"), raw("user:"), raw(""), raw("user:" + good + "\n"), raw("user:" + good + "\r\n"), raw("user:\n" + good),
		raw("user:" + good + "\r\nX: 1"),
		raw("user:" + good + "\x00"), raw("user: " + good), raw("user:" + good + " "), raw("user:" + good + ":x"),
		raw("user:é" + good), raw("user:\xff" + good),
		raw("user:" + good + smuggled), raw("user:x" + smuggled), raw("user:Bearer " + good), raw("user:\u2028" + good),
		raw("user:" + good + "\v"),
		raw("user:"+good) + " x", "Proxy-Authorization: Bearer " + good, "Authorisation: Bearer " + good,
		"Cookie: token=" + good,
		"Private-Token: " + good,
	}
	p.target.taken()
	try := func() asked {
		before := p.asked()
		for _, header := range headers {
			got := p.get(gitPort, fetchPath, header)
			if got.status == 400 && strings.ContainsAny(header, "\x00\n") { // no token's fault: nginx refuses the request
				continue
			}
			p.wantChallenge(fmt.Sprintf("%.60q… (%d bytes)", header, len(header)), got)
		}
		return p.asked().since(before)
	}
	if got := try(); got.unknown != 0 {
		if got = try(); got.unknown != 0 { // the first may have been somebody else's
			p.Errorf("the API server was asked about what is no token: %+v", got)
		}
	}
	// What is in the user's part does not matter, since only the token goes on.
	if got := p.get(gitPort, fetchPath, raw("us\r\ner:"+good)); got.status != 200 {
		p.Errorf("a line break in the user's name: %d %s", got.status, got.body)
	}
	p.target.taken()

	// Sizes: a token that is longer than any is a wrong one, and headers have an end.
	p.wantChallenge("24 KB", p.get(gitPort, fetchPath, bearer(strings.Repeat("a", 24<<10))))
	for what, header := range sorted(map[string]string{
		"40 KB": bearer(strings.Repeat("a", 40<<10)), "70 KB of cookies": bearer(good) + "\r\nCookie: " +
			strings.Repeat("a", 70<<10),
		"a megabyte of headers": bearer(good) + strings.Repeat("\r\nX: "+strings.Repeat("a", 1000), 1000),
	}) {
		if got := p.get(gitPort, fetchPath, header); got.status != 400 && got.status != 0 {
			p.Errorf("%s: %d %s", what, got.status, got.body)
		}
	}
	if got := p.get(gitPort, "/"+strings.Repeat("a/", 20<<10)+"info/refs?service=git-upload-pack",
		bearer(good)); got.status != 414 && got.status != 400 {
		p.Errorf("a path of 40 KB: %d", got.status)
	}
	if taken := p.target.taken(); len(taken) > 0 {
		p.Errorf("%d requests reached the target", len(taken))
	}
}

// refusesSmuggling sends the usual pairs of which two servers could make two different requests. Nothing but the one
// request that nginx sees may reach the target.
func (p standardProxy) refusesSmuggling() {
	hidden := "GET /api/v4/user HTTP/1.1\r\nHost: git.example.com\r\n\r\n"
	head := "POST /x.git/git-upload-pack HTTP/1.1\r\nHost: proxy\r\n" + bearer(p.tokens["git-user"]) +
		"\r\nConnection: close\r\n"
	chunked := "0\r\n\r\n" + hidden
	length := func(body string) string { return fmt.Sprintf("Content-Length: %d\r\n", len(body)) }
	for what, request := range sorted(map[string]string{
		"CL.TE":              head + length(chunked) + "Transfer-Encoding: chunked\r\n\r\n" + chunked,
		"TE.CL":              head + "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + chunked,
		"two lengths":        head + "Content-Length: 0\r\n" + length(hidden) + "\r\n" + hidden,
		"list of lengths":    head + "Content-Length: 0, 60\r\n\r\n" + hidden,
		"signed length":      head + "Content-Length: +0\r\n\r\n" + hidden,
		"negative length":    head + "Content-Length: -1\r\n\r\n" + hidden,
		"hexadecimal length": head + "Content-Length: 0x0\r\n\r\n" + hidden,
		"TE twice":           head + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + chunked,
		"TE of two":          head + "Transfer-Encoding: gzip, chunked\r\n\r\n" + chunked,
		"TE unknown":         head + "Transfer-Encoding: xchunked\r\n\r\n" + chunked,
		"TE with a tab":      head + "Transfer-Encoding:\tchunked\r\n" + length(chunked) + "\r\n" + chunked,
		"TE with a space":    head + "Transfer-Encoding : chunked\r\n" + length(chunked) + "\r\n" + chunked,
		"TE folded":          head + "Transfer-Encoding:\r\n chunked\r\n" + length(chunked) + "\r\n" + chunked,
		"TE after a bare LF": head + "X: y\nTransfer-Encoding: chunked\r\n" + length(chunked) + "\r\n" + chunked,
		"bad chunk":          head + "Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n" + hidden,
		"chunk's extension":  head + "Transfer-Encoding: chunked\r\n\r\n0;a=b\r\n\r\n" + hidden,
		"huge chunk":         head + "Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n\r\n" + hidden,
		"chunk and bare LF":  head + "Transfer-Encoding: chunked\r\n\r\n0\n\n" + hidden,
		"pipelined":          strings.Replace(head, "Connection: close\r\n", "", 1) + "Content-Length: 0\r\n\r\n" + hidden,
		"body of a GET": "GET " + fetchPath + " HTTP/1.1\r\nHost: proxy\r\n" + bearer(p.tokens["git-user"]) + "\r\n" +
			length(hidden) + "\r\n" + hidden,
		"HTTP/1.0 and TE": strings.Replace(head, "HTTP/1.1", "HTTP/1.0", 1) + "Transfer-Encoding: chunked\r\n\r\n" +
			chunked,
		"HTTP/0.9":        "GET " + fetchPath + "\r\n" + hidden,
		"HTTP/2 by prior": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + hidden,
		"line in the URI": "POST /x.git/git-upload-pack HTTP/1.1\r\n" + hidden + " HTTP/1.1\r\n\r\n",
		"no host": "POST /x.git/git-upload-pack HTTP/1.1\r\n" + bearer(p.tokens["git-user"]) +
			"\r\nContent-Length: 0\r\n\r\n" + hidden,
		"two hosts": head + "Host: git.example.com\r\nContent-Length: 0\r\n\r\n" + hidden,
		"Expect, no token": "POST /x.git/git-upload-pack HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n" +
			length(hidden) + "\r\n" + hidden,
		"h2c": head +
			"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\nContent-Length: 0\r\n\r\n" + hidden,
	}) {
		p.target.taken()
		p.send(p.pods[0]+":"+gitPort, request)
		for _, taken := range p.target.taken() {
			if path := taken.URL.Path; path != "/x.git/git-upload-pack" && path != "/x.git/info/refs" {
				p.Errorf("%s: %s %s reached the target", what, taken.Method, taken.RequestURI)
			}
			if taken.Host != "git.example.com" {
				p.Errorf("%s: the target's name is %q", what, taken.Host)
			}
		}
	}
}

// saysThatItCannotAsk stops the API server.
func (p standardProxy) saysThatItCannotAsk() {
	known, unknown := p.token("git-user"), p.token("git-user")
	if got := p.get(gitPort, fetchPath, bearer(known)); got.status != 200 {
		p.Fatalf("%d %s", got.status, got.body)
	}
	theNode.APIServer.Stop()
	start := sync.OnceFunc(func() {
		theNode.APIServer = theNode.Restart(theNode.APIServer)
		p.eventually(func() error { _, err := cluster.Kubectl("get", "--raw", "/readyz"); return err })
	})
	defer start()
	if got := p.get(gitPort, fetchPath, bearer(known)); got.status != 200 {
		p.Errorf("a token that was good a moment before: %d %s", got.status, got.body)
	}
	got := p.get(gitPort, fetchPath, bearer(unknown))
	if got.status != 503 || !strings.Contains(got.body, "cannot be asked") || got.header.Get("Retry-After") == "" ||
		got.header.Get("WWW-Authenticate") != "" {
		p.Errorf("a token of which nothing is known: %d, %v, %q", got.status, got.header, got.body)
	}
	p.wantChallenge("no token", p.get(gitPort, fetchPath))
	start()
	p.eventually(func() error {
		if got := p.get(gitPort, fetchPath, bearer(unknown)); got.status != 200 {
			return fmt.Errorf("the API server is back: %d %s", got.status, got.body)
		}
		return nil
	})
}

// floodLimit is how many requests a second with wrong tokens may reach the API server from one client's address: ten
// for each of two Pods, and what they let pass at once in the beginning.
const floodLimit = 25

// withstandsWrongTokens sends 1,000 wrong tokens a second for half a minute, while a Pod goes on fetching.
func (p standardProxy) withstandsWrongTokens() {
	p.pod("fetching", `{connector.name: git, configuration.names: config}`)
	p.running("fetching")
	fetch := func() (string, error) {
		return p.sh("fetching", "HOME=/volume git ls-remote https://git.example.com/team/app.git")
	}
	if output, err := fetch(); err != nil {
		p.Fatalf("%v: %s", err, output)
	}
	const rate, duration = 1000, 30 * time.Second
	before, began := p.asked(), time.Now()
	var sent, refused, limited, other atomic.Int64
	var all sync.WaitGroup
	const senders = 20
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: senders}}
	for i := range senders {
		all.Go(func() {
			for n := 0; time.Since(began) < duration; n++ {
				time.Sleep(time.Until(began.Add(time.Duration(n) * senders * time.Second / rate)))
				request, err := http.NewRequest("GET", "http://"+p.pods[i%2]+":"+gitPort+fetchPath, nil)
				if err != nil {
					p.Error(err)
					return
				}
				request.Header.Set("Authorization", "Bearer "+rand.Text())
				sent.Add(1)
				response, err := client.Do(request)
				if err != nil {
					other.Add(1)
					continue
				}
				io.Copy(io.Discard, response.Body)
				response.Body.Close()
				switch response.StatusCode {
				case 401:
					refused.Add(1)
				case 429:
					limited.Add(1)
				default:
					other.Add(1)
				}
			}
		})
	}
	var took []time.Duration
	for time.Since(began) < duration {
		start := time.Now()
		if output, err := fetch(); err != nil {
			p.Errorf("an honest fetch: %v: %s", err, output)
		}
		took = append(took, time.Since(start))
	}
	all.Wait()
	seconds := time.Since(began).Seconds()
	got := p.asked().since(before)
	slices.Sort(took)
	p.Logf("%d wrong tokens in %.0f s: %d got 401, %d 429, %d another answer or none; "+
		"%d reached the API server (%.1f a second); "+
		"%d honest fetches, the middle one in %v, the slowest in %v", sent.Load(), seconds, refused.Load(), limited.Load(),
		other.Load(),
		got.unknown, float64(got.unknown)/seconds, len(took), took[len(took)/2].Round(time.Millisecond),
		took[len(took)-1].Round(time.Millisecond))
	if sent.Load() < rate*int64(duration.Seconds())*9/10 || other.Load() > 0 || limited.Load() == 0 {
		p.Error("this was no flood, or not all were refused in order")
	}
	if float64(got.unknown) > floodLimit*seconds {
		p.Errorf("%d requests reached the API server, more than %d a second", got.unknown, floodLimit)
	}
}
